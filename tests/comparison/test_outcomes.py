"""The numbers of a run follow from its curve, and runs that never reach a threshold are kept."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sae_rl.comparison.curves import SUCCESS, RunCurves
from sae_rl.comparison.outcomes import Arm, halfway

from .made_up import curves_of

STEPS = (0, 10, 15, 40)


def arm_of(*curves: tuple[float, ...], steps: tuple[int, ...] = STEPS, last: float = 0.25, name: str = "a") -> Arm:
    runs = [curves_of(dict(zip(steps, curve, strict=True)), arm=name, seed=str(i)) for i, curve in enumerate(curves)]
    return Arm(name, runs, steps, SUCCESS, last, has_scores=False)


def test_final_score_mean_of_the_last_and_area() -> None:
    arm = arm_of((0.1, 0.5, 0.3, 0.9), (0.2, 0.2, 0.2, 0.2), last=0.7)
    *curve, final, last, area = arm.linear.T
    assert np.array(curve).T.tolist() == arm.curves.tolist()
    assert final.tolist() == [0.9, 0.2]
    assert last == pytest.approx([(0.3 + 0.9) / 2, 0.2]), "evaluations after step 12"
    assert area == pytest.approx([np.trapezoid([0.1, 0.5, 0.3, 0.9], STEPS) / 40, 0.2])


def test_a_single_evaluation_is_its_own_area() -> None:
    assert arm_of((0.4,), steps=(5,)).linear.tolist() == [[0.4] * 4]


def test_scores_of_prompts_give_the_same_numbers() -> None:
    scores = np.random.default_rng(0).random((3, 4, 6))
    runs = []
    for seed, of_run in enumerate(scores):
        success = dict(zip(STEPS, of_run.mean(1).tolist(), strict=True))
        by_prompt = dict(zip(STEPS, of_run, strict=True))
        runs.append(curves_of(success, seed=str(seed), scores=by_prompt, prompts={"level": 6}))
    with_prompts = Arm("a", runs, STEPS, SUCCESS, 0.25, has_scores=True).linear
    assert with_prompts.shape == (3, 7, 6)
    assert with_prompts.mean(2) == pytest.approx(Arm("a", runs, STEPS, SUCCESS, 0.25, has_scores=False).linear)
    assert with_prompts[1, 2] == pytest.approx(scores[1, 2])


def test_the_largest_drawdown() -> None:
    curves = [(0.1, 0.5, 0.3, 0.9), (0.1, 0.2, 0.3, 0.4), (0.8, 0.1, 0.9, 0.5)]
    brute = [max(curve[i] - curve[j] for i in range(4) for j in range(i, 4)) for curve in curves]
    assert arm_of(*curves).drawdowns == pytest.approx(brute)
    assert brute == pytest.approx([0.2, 0.0, 0.7])


def test_a_run_that_never_gets_there_is_censored() -> None:
    arm = arm_of((0.1, 0.5, 0.3, 0.9), (0.6, 0.2, 0.2, 0.2), (0.1, 0.2, 0.3, 0.4))
    times, observed = arm.durations(0.5)
    assert times.tolist() == [[10, 1000.0], [0, 0.0], [math.inf, math.inf]]
    assert observed.tolist() == [[40, 4000.0]] * 3


def test_tokens_of_a_step_that_is_not_known_are_not_made_up() -> None:
    run = curves_of({0: 0.1, 2: 0.3, 4: 0.5}, training={"sampled_tokens": {0: 5.0, 1: 7.0, 3: 1.0}})
    tokens = Arm("a", [run], (0, 2, 4), SUCCESS, 0.25, has_scores=False).tokens
    assert tokens[0, :2].tolist() == [0, 12] and math.isnan(tokens[0, 2])


def test_a_run_without_training_has_no_tokens() -> None:
    run = curves_of({0: 0.1, 2: 0.3}, training={})
    assert np.isnan(Arm("a", [run], (2,), SUCCESS, 0.25, has_scores=False).tokens).all()


def test_the_definition_of_divergence() -> None:
    arm = arm_of(
        (0.3, 0.6, 0.6, 0.29),  # below its first score
        (0.1, 0.9, 0.8, 0.44),  # below half of its best score
        (0.3, 0.6, 0.5, 0.35),
        (0.3, 0.3, 0.3, 0.30),
    )
    assert arm.diverged == 2
    assert arm_of((-1.0, -0.9, -0.8, -0.8), (-1.0, -0.5, -0.9, -1.1)).diverged == 1, "half is no measure below 0"


def test_the_threshold_is_half_way_to_the_best_arm() -> None:
    assert halfway([arm_of((0.1, 0.2, 0.3, 0.5)), arm_of((0.3, 0.2, 0.3, 0.9), name="b")]) == 0.55


def test_rewards_of_training_are_a_curve_too() -> None:
    run: RunCurves = curves_of(
        {0: 0.1, 2: 0.3}, training={"rollout/reward_mean": {0: 0.2, 1: 0.4}, "sampled_tokens": {}}
    )
    assert Arm("a", [run], (1, 2), "rollout/reward_mean", 0.25, has_scores=False).curves.tolist() == [[0.2, 0.4]]
