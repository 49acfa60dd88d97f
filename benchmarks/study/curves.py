"""What stays of a run: its curve as a CSV file of `sae-rl compare`, and beside it a JSON file that says what made it.

Both are small and are committed. Figures are made from them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sae_rl.comparison.curves import RunCurves, csv_text, read_csv
from sae_rl.comparison.runs import read_runs


def write_curve(folder: Path, file: Path, arm: str) -> bool:
    """Writes the curve of a run's folder, and returns whether the run left anything to write."""
    if not (folder / "config.yaml").exists() or not (folder / "metrics.jsonl").exists():
        return False
    (run, *_), _ = read_runs([folder])
    every_steps = yaml.safe_load((folder / "config.yaml").read_text())["evaluation"]["every_steps"]
    write(file, csv_text(counted(replace(run, arm=arm), every_steps)))
    return True


def counted(run: RunCurves, every_steps: int) -> RunCurves:
    """A run that failed counts in every mean: its success is 0 in the evaluations that it did not reach."""
    missed = sorted({*range(0, run.steps, every_steps), run.steps} - run.success.keys())
    none = {step: np.zeros(sum(run.prompts.values())) for step in missed if run.scores}
    success = {**run.success, **dict.fromkeys(missed, 0.0)}
    return replace(run, success=success, scores={**run.scores, **none}, problem="")


def area(file: Path) -> float:
    """The primary outcome: the trapezoids' mean of held-out success over steps. 0 if there is no curve."""
    if not file.exists():
        return 0.0
    success = read_csv(file).success
    steps = sorted(success)
    return float(np.trapezoid([success[step] for step in steps], steps) / steps[-1])


def source() -> str:
    """The commit of the source, with ``+`` behind it if files differ from it; empty outside of a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--", ":/sae_rl", ":/conf"))


def digest(file: Path) -> str | None:
    """The SHA-256 of a file; None: there is no such file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def weights_digest(folder: Path) -> str | None:
    """The SHA-256 of a model's weights, all parts of them in the order of their names; None: there are none."""
    found = hashlib.sha256()
    if not (parts := sorted(folder.glob("*.safetensors"))):
        return None
    for part in parts:
        found.update(part.read_bytes())
    return found.hexdigest()


def read_record(file: Path) -> dict[str, Any]:
    """What is known of a job that was started; empty: nothing."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    write(file, json.dumps(record, indent=1) + "\n")


def write(file: Path, text: str) -> None:
    """Writes a file that is there completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp")
    partial.write_text(text)
    partial.replace(file)
