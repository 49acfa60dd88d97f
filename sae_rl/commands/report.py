"""``sae-rl report``, and the report that every training run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from sae_rl.analysis.viewer import Vocabulary  # torch and its kernels take seconds

REPORT = "report.html"


def write_run_report(folder: Path) -> Path:
    """Writes ``report.html`` into a run's folder and returns its path. Raises ValueError if it has no training step."""
    from sae_rl.analysis.report import write_report  # matplotlib takes a second

    config = yaml.safe_load((folder / "config.yaml").read_text())
    target = folder / REPORT
    write_report(folder, target, f"sae_rl: {config['name']}", vocabulary_of(config["model"]["path"]))
    return target


def vocabulary_of(model: str) -> Vocabulary:
    """What pages need of a model's tokenizer."""
    from transformers import AutoTokenizer

    from sae_rl.analysis.viewer import Vocabulary

    tokenizer = AutoTokenizer.from_pretrained(model)
    return Vocabulary(
        decode=lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        special_ids=frozenset(tokenizer.all_special_ids),
    )


def leave_report(folder: Path) -> str:
    """Writes the report of a run that ends, and returns a line about it. Raises nothing."""
    try:
        return f"report: {write_run_report(folder)}"
    except Exception as error:  # the run is over: a report that fails must not hide how the run ended
        return f"no {REPORT}: {error}"
