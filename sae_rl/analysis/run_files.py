"""What a run left behind, read back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sae_rl.records.metrics import METRICS, Phase, data_set_of, show
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import rollout_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Held-out success after ``step`` steps, with its interval."""

    step: int
    success_mean: float
    success_low: float
    success_high: float
    response_tokens_mean: float
    truncated_fraction: float
    num_prompts: int
    samples_per_prompt: int

    @property
    def interval(self) -> str:
        return f"[{show(self.success_low)}, {show(self.success_high)}]" if math.isfinite(self.success_low) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One line of the before/after table."""

    label: str
    before: str
    after: str
    before_interval: str = ""
    after_interval: str = ""


@dataclass(frozen=True)
class RunFiles:
    """The folder of a run; everything but ``metrics.jsonl`` may be absent."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "metrics.jsonl").is_file():
            raise ValueError(f"{self.folder} has no metrics.jsonl: it is no folder of a run, or logger.jsonl was false")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")

    def series(self, name: str, phase: Phase = "train") -> list[tuple[int, float]]:
        """(step, value) of one metric; nan where it was not finite."""
        return [
            (int(row["step"]), math.nan if row[name] is None else float(row[name]))
            for row in self.rows
            if row["phase"] == phase and name in row
        ]

    @cached_property
    def evaluations(self) -> list[Evaluated]:
        """By step; of a step that was evaluated twice, the last."""
        rows = {int(row["step"]): row for row in self.rows if row["phase"] == "evaluation"}
        return [
            Evaluated(
                step=step,
                success_mean=row["evaluation/success_mean"],
                success_low=row["evaluation/success_low"],
                success_high=row["evaluation/success_high"],
                response_tokens_mean=row["evaluation/response_tokens_mean"],
                truncated_fraction=row["evaluation/truncated_fraction"],
                num_prompts=int(row["evaluation/num_prompts"]),
                samples_per_prompt=int(row["evaluation/samples_per_prompt"]),
            )
            for step, row in sorted(rows.items())
        ]

    @cached_property
    def data_sets(self) -> list[str]:
        """That evaluations tell apart; empty where there is one."""
        names = (data_set_of(name) for row in self.rows if row["phase"] == "evaluation" for name in row)
        return list(dict.fromkeys(name for name in names if name is not None))

    @cached_property
    def rollouts(self) -> list[tuple[int, Path]]:
        return rollout_files(self.folder)

    @property
    def config_text(self) -> str | None:
        file = self.folder / "config.yaml"
        return file.read_text() if file.is_file() else None

    @property
    def num_steps(self) -> int:
        return len([row for row in self.rows if row["phase"] == "train"])

    @property
    def seconds(self) -> float:
        """Wall time of all training steps."""
        return float(np.nansum([value for _, value in self.series("time/step_s")]))

    @property
    def averaged_steps(self) -> int:
        """A single step is noisy, so before and after are means over the first and last tenth of the steps."""
        return max(1, self.num_steps // 10)

    def changes(self) -> list[Change]:
        """The lines that the report's headline and the console's closing table show."""
        changes = []
        if len(self.evaluations) > 1:
            first, last = self.evaluations[0], self.evaluations[-1]
            changes += [
                Change(
                    label="held-out success",
                    before=show(first.success_mean),
                    after=show(last.success_mean),
                    before_interval=first.interval,
                    after_interval=last.interval,
                ),
                Change(
                    label="held-out length, tokens",
                    before=show(first.response_tokens_mean),
                    after=show(last.response_tokens_mean),
                ),
                Change(
                    label="held-out truncated",
                    before=show(first.truncated_fraction, "fraction"),
                    after=show(last.truncated_fraction, "fraction"),
                ),
            ]
        names = {
            "rollout/reward_mean": "training reward",
            "rollout/tokens_mean": "response length, tokens",
            "segment/per_response_mean": "segments per response",
            "critic/explained_variance": "explained variance",
            "time/step_s": "seconds per step",
        }
        for name, label in names.items():
            if values := [value for _, value in self.series(name)]:
                unit = METRICS[name].unit
                before, after = values[: self.averaged_steps], values[-self.averaged_steps :]
                changes.append(Change(label=label, before=show(_mean(before), unit), after=show(_mean(after), unit)))
        return changes


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
