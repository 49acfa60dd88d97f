"""The choice of runs that can be compared with each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sae_rl.comparison.curves import SUCCESS, RunCurves
from sae_rl.comparison.outcomes import REWARD, Arm, learning_curve
from sae_rl.comparison.runs import Unread


@dataclass(frozen=True, slots=True)
class Selection:
    """Arms of comparable runs, and all other runs with the reason why they are left out."""

    arms: list[Arm]
    failed: dict[str, list[RunCurves]]  # by arm; incomplete runs that would be compared
    left_out: list[Unread]
    notes: list[str]
    measure: str  # the metric that is compared


def select(runs: Sequence[RunCurves], unread: Sequence[Unread], last_fraction: float) -> Selection:
    """Runs with the same held-out prompts and number of steps: the largest such set of complete runs.

    Raises:
        ValueError: no run is complete, or an arm has two runs with one seed.
    """
    complete = [run for run in runs if not run.problem]
    if not complete:
        problems = [f"{run.source} ({run.problem})" for run in runs] + [
            f"{run.source} ({run.reason})" for run in unread
        ]
        raise ValueError(f"no run is complete: {'; '.join(problems)}")
    measure = SUCCESS if any(run.success for run in complete) else REWARD
    runs = [_with_last_evaluation(run, measure) for run in runs]
    ((held_out, steps), _), *_ = Counter((r.held_out, r.steps) for r in runs if not r.problem).most_common() or [
        ((runs[0].held_out, runs[0].steps), 0)
    ]
    is_own = [(run.held_out, run.steps) == (held_out, steps) for run in runs]
    own = [run for run, is_one in zip(runs, is_own, strict=True) if is_one]
    others = [run for run, is_one in zip(runs, is_own, strict=True) if not is_one]
    left_out = [Unread(str(run.source), _difference(run, own[0])) for run in others]
    compared = [run for run in own if not run.problem]
    if not compared:
        raise ValueError(f"no run can be compared: {'; '.join(f'{run.source} ({run.problem})' for run in own)}")
    _refuse_doubles(compared)
    notes = [_about(own[0], len(compared), len(left_out))] if left_out else []
    if measure == REWARD:
        notes.append("No run was evaluated on held-out prompts: the reward of training is compared, over the steps.")
    sets = [_measured(run, measure) for run in compared]
    common = sorted(set.intersection(*sets))
    if dropped := sorted(set.union(*sets) - set(common)):
        notes.append(f"Not all runs were evaluated after the steps {', '.join(map(str, dropped))}: these are left out.")
    has_scores, note = _usable_scores(compared, common) if measure == SUCCESS else (False, "")
    notes += [note] if note else []
    names = list(dict.fromkeys(run.arm for run in own))
    by_arm = {name: [run for run in compared if run.arm == name] for name in names}
    arms = [Arm(n, found, tuple(common), measure, last_fraction, has_scores) for n, found in by_arm.items() if found]
    failed = {name: [run for run in own if run.arm == name and run.problem] for name in names}
    return Selection(arms, failed, [*unread, *left_out], notes, measure)


def _with_last_evaluation(run: RunCurves, measure: str) -> RunCurves:
    if run.problem or run.steps in _measured(run, measure):
        return run
    lacking = "evaluation" if measure == SUCCESS else measure
    return replace(run, problem=f"no {lacking} after the last step")


def _measured(run: RunCurves, measure: str) -> set[int]:
    """The steps after which the measure is known, and is a number."""
    return {step for step, value in learning_curve(run, measure).items() if not math.isnan(value)}


def _difference(run: RunCurves, other: RunCurves) -> str:
    if run.problem:
        return run.problem
    if run.held_out != other.held_out:
        return f"other held-out prompts: {run.held_out} instead of {other.held_out}"
    return f"{run.steps} steps instead of {other.steps}"


def _about(first: RunCurves, num_compared: int, num_left_out: int) -> str:
    what = f"{num_compared} runs of {first.task} with {first.steps} steps and the same held-out prompts are compared"
    return f"{what}; {num_left_out} with other held-out prompts or another number of steps are not: compare them apart."


def _refuse_doubles(runs: Sequence[RunCurves]) -> None:
    seen: dict[tuple[str, str], RunCurves] = {}
    for run in runs:
        if (before := seen.setdefault((run.arm, run.seed), run)) is not run:
            raise ValueError(
                f"two runs of the arm {run.arm!r} have the seed {run.seed}: {before.source} and {run.source}; "
                "leave one out, or name a key that tells them apart with --arm-by"
            )


def _usable_scores(runs: Sequence[RunCurves], steps: Sequence[int]) -> tuple[bool, str]:
    """Whether every run has the scores of the same prompts at every step, and a note if only some do."""
    known = [bool(run.scores) and set(steps) <= set(run.scores) for run in runs]
    alike = len({tuple(run.prompts.items()) for run in runs}) == 1
    if all(known) and alike:
        return True, ""
    if not any(known):
        return (
            False,
            "No run recorded the scores of prompts (evaluation.record_samples): intervals are over seeds alone.",
        )
    return (
        False,
        "Not all runs recorded the scores of the same prompts at every evaluation: intervals are over seeds alone.",
    )
