"""The files of a run, read back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sae_rl.analysis.plots import Curve
from sae_rl.records.metrics import data_set_of
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import FOLDER, step_files


@dataclass(frozen=True)
class RunFiles:
    """The folder of a run. Every file but ``metrics.jsonl`` may be missing."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "metrics.jsonl").is_file():
            raise ValueError(f"{self.folder} has no metrics.jsonl: it is no folder of a run, or logger.jsonl was false")

    @cached_property
    def rows(self) -> dict[str, dict[int, dict[str, Any]]]:
        """The metrics by phase and step; NaN stands for a number that was not finite."""
        found: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "evaluation": {}, "pretraining": {}}
        for row in read_jsonl(self.folder / "metrics.jsonl"):
            numbers = {name: math.nan if value is None else value for name, value in row.items()}
            found[row["phase"]][int(row["step"])] = numbers
        return {phase: dict(sorted(rows.items())) for phase, rows in found.items()}

    def series(self, name: str) -> dict[int, float]:
        """A metric of training or of evaluations, by step."""
        rows = self.rows["evaluation" if name.startswith("evaluation/") else "train"]
        return {step: float(row[name]) for step, row in rows.items() if name in row}

    def curve(self, name: str) -> Curve:
        """A metric by step, with its interval where it has one."""
        value, stem = self.series(name), name.removesuffix("_mean")
        ends = (self.series(f"{stem}_{end}") for end in ("low", "high"))
        low, high = ([end.get(step, math.nan) for step in value] if end else [] for end in ends)
        colour = "c2" if name.startswith("evaluation/") else "c1"
        return Curve(x=[*value], y=[*value.values()], low=low, high=high, colour=colour)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The metrics of each evaluation, by step."""
        return list(self.rows["evaluation"].values())

    @property
    def data_sets(self) -> list[str]:
        """The data sets that evaluations tell apart; empty where there is only one."""
        names = (data_set_of(name) for row in self.evaluations for name in row)
        return list(dict.fromkeys(name for name in names if name is not None))

    @cached_property
    def rollouts(self) -> list[tuple[int, Path]]:
        return step_files(self.folder / FOLDER)

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` holds; empty where there is none."""
        return dict(yaml.safe_load(self.config_text) or {})

    @property
    def config_text(self) -> str:
        file = self.folder / "config.yaml"
        return file.read_text() if file.is_file() else ""

    @property
    def num_steps(self) -> int:
        return len(self.rows["train"])

    @property
    def duration(self) -> str:
        """Wall time of all training steps."""
        seconds = float(np.nansum([*self.series("time/step_s").values()]))
        if seconds < 120:
            return f"{seconds:.0f} s"
        return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
