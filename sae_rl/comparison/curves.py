"""The curves of one run, and the CSV files that hold them.

S   training steps
E   evaluations
P   held-out prompts
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_rl.records.metrics import PHASES

Floats = npt.NDArray[np.float64]

TOKENS = "sampled_tokens"  # sampled in a step, continuations included
DIAGNOSTICS = (  # metrics of training that a comparison shows, averaged over steps
    *("rollout/reward_mean", "rollout/tokens_mean", "rollout/truncated_fraction"),
    *("critic/explained_variance", "values/explained_variance", "policy/entropy_mean", "rollout/entropy_estimate"),
    *("segment/per_response_mean", "segment/tokens_mean", "segment/opens_fraction"),
    *("policy/grad_norm", "critic/grad_norm", "policy/clip_fraction", "policy/approx_kl"),
)
TRAINING = (*DIAGNOSTICS, *PHASES, "time/step_s")
SUCCESS = "evaluation/success_mean"
FIRST_LINE = "# curves of one run, for sae-rl compare"
csv.field_size_limit(1 << 30)  # `scores` may hold many thousands of prompts
HEAD = ("arm", "seed", "task", "held_out", "steps", "problem", "update_failed", "prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCurves:
    """What a comparison reads of one run."""

    source: Path
    arm: str = ""  # empty: the configuration decides
    seed: str
    task: str
    held_out: str  # the held-out prompts and how they are sampled; runs with other ones are not compared
    steps: int  # that the run was to do
    problem: str = ""  # why the run is not complete; empty: it did all steps
    update_failed: bool = False  # it ended early because an update failed
    prompts: Mapping[str, int] = field(default_factory=dict)  # by data set, in the order of ``scores``; empty: unknown
    training: Mapping[str, Mapping[int, float]]  # by metric and step, counted from 0; `TOKENS` too
    success: Mapping[int, float]  # by the number of steps done
    scores: Mapping[int, Floats] = field(default_factory=dict)  # (P,) mean score of each prompt
    settings: Mapping[str, Any] = field(default_factory=dict)  # the configuration by full key; empty in CSV files


def csv_text(run: RunCurves) -> str:
    """A run as CSV: head lines ``# key: value``, then a row for each evaluation and each training step.

    Numbers have six significant digits. ``scores`` of an evaluation are the mean scores of its prompts, by spaces.
    """
    lines = [FIRST_LINE]
    for key in HEAD:
        value = getattr(run, key)
        lines.append(f"# {key}: {json.dumps(dict(value)) if key == 'prompts' else ' '.join(str(value).split())}")
    columns = [name for name in (*TRAINING, TOKENS) if name in run.training]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["phase", "step", SUCCESS, "scores", *columns])
    for step, value in sorted(run.success.items()):
        scores = " ".join(map(_short, run.scores[step].tolist())) if step in run.scores else ""
        rows.writerow(["evaluation", step, _short(value), scores, *[""] * len(columns)])
    for step in sorted({step for name in columns for step in run.training[name]}):
        found = (run.training[name].get(step) for name in columns)
        rows.writerow(["train", step, "", "", *("" if value is None else _short(value) for value in found)])
    return "\n".join([*lines, text.getvalue()])


def is_curves(file: Path) -> bool:
    """Whether a file begins as `csv_text` does."""
    with file.open(errors="replace") as text:
        return text.readline().strip() == FIRST_LINE


def read_csv(file: Path) -> RunCurves:
    """The run of a file that `csv_text` wrote. Raises ValueError for any other file; the message says which line is wrong."""
    lines = file.read_text(errors="replace").splitlines()
    if not lines or lines[0].strip() != FIRST_LINE:
        raise ValueError(f"{file} holds no curves: its first line is not {FIRST_LINE!r}")
    head = dict(line[2:].partition(": ")[::2] for line in lines[1:] if line.startswith("# "))
    head = {key.rstrip(":"): value.strip() for key, value in head.items()}
    if lacking := [key for key in HEAD if key not in head]:
        raise ValueError(f"{file} lacks the head lines {', '.join(f'# {key}: ...' for key in lacking)}")
    body = [line for line in lines if not line.startswith("#")]
    success: dict[int, float] = {}
    scores: dict[int, Floats] = {}
    training: dict[str, dict[int, float]] = {}
    try:
        prompts, steps = json.loads(head["prompts"]), int(head["steps"])
        for row in csv.DictReader(body):
            step = int(row.pop("step"))
            if row.pop("phase") == "evaluation":
                success[step] = float(row[SUCCESS])
                if row["scores"]:
                    scores[step] = _numbers(row["scores"].split(), sum(prompts.values()))
            else:
                for name, value in row.items():
                    if value and name not in (SUCCESS, "scores"):
                        training.setdefault(name, {})[step] = float(value)
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise ValueError(f"{file} holds no curves that can be read: {error!r}") from error
    texts = {key: head[key] for key in ("arm", "seed", "task", "held_out", "problem")}
    return RunCurves(
        source=file,
        **texts,  # type: ignore[arg-type]
        steps=steps,
        update_failed=head["update_failed"] == "True",
        prompts=prompts,
        training=training,
        success=success,
        scores=scores,
    )


def _numbers(words: Iterable[str], count: int) -> Floats:
    numbers = np.array([float(word) for word in words])
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} scores for {count} prompts")
    return numbers


def _short(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "nan"
