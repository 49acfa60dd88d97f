"""The verdicts are those that the simulated runs deserve, and every run is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from sae_rl.analysis.comparison_table import tables
from sae_rl.comparison.curves import RunCurves
from sae_rl.comparison.results import Choices, Comparison, compare
from sae_rl.comparison.runs import Unread
from sae_rl.comparison.selection import select
from sae_rl.records.metrics import show

from .made_up import curves_of

STEPS = (0, 5, 10, 15, 20)


def simulated(
    arm: str, gain: float, seeds: Sequence[int], *, of_seeds: float = 0.02, noise: float = 0.01
) -> list[RunCurves]:
    """Runs that rise by ``gain``; what a seed adds is the same in every arm."""
    runs = []
    for seed in seeds:
        shared = np.random.default_rng(seed).normal(0, of_seeds)
        own = np.random.default_rng([seed, *arm.encode()]).normal(0, noise, len(STEPS))
        values = 0.2 + (gain + shared) * np.array(STEPS) / 20 + own * (np.array(STEPS) > 0)
        runs.append(curves_of(dict(zip(STEPS, values.tolist(), strict=True)), arm=arm, seed=str(seed)))
    return runs


def compared(
    runs: Sequence[RunCurves], unread: Sequence[Unread] = (), notes: Sequence[str] = (), **choices: object
) -> Comparison:
    chosen = Choices(**choices)  # type: ignore[arg-type]
    return compare(select(runs, unread, chosen.last_fraction), notes, chosen)


def test_verdicts_and_sentences() -> None:
    gains = {"base": 0.4, "up": 0.5, "down": 0.3, "same": 0.4}
    runs = [run for arm, gain in gains.items() for run in simulated(arm, gain, range(6))]
    found = compared(runs)
    up, down, same = found.differences
    assert [each.verdict for each in found.differences] == ["better", "worse", "no difference shown"]
    change = up.outcomes["final"]
    assert change.low < 0.1 < change.high and change.p < change.holm_p < 0.001
    assert up.sentence == (
        f"up is better than base: final score, difference +{change.value:.3f}, 95 % interval [+{change.low:.3f}, "
        f"+{change.high:.3f}]; paired over 6 seeds; p < 0.001, p < 0.001 after Holm's correction for 3 arms."
    )
    assert down.sentence.startswith("down is worse than base: final score, difference -0.")
    assert same.sentence.startswith("same and base: no difference shown; final score, difference ")
    assert up.improvement.value == 1.0 and up.improvement.low < 1 and up.num_pairs == 6
    assert found.arms[1].outcomes["final"].value == pytest.approx(np.mean([run.success[20] for run in runs[6:12]]))
    assert found.arms[1].final_std == pytest.approx(np.std([run.success[20] for run in runs[6:12]], ddof=1))


def test_lower_is_better_where_time_and_falls_are_compared() -> None:
    runs = simulated("base", 0.4, range(6)) + simulated("fast", 0.8, range(6))
    found = compared(runs, outcome="steps_to", threshold=0.5)
    base, fast = found.arms
    assert found.differences[0].verdict == "better" and found.differences[0].outcomes["steps_to"].value < -5
    assert (base.num_reached, fast.num_reached) == (sum(run.success[20] >= 0.5 for run in runs[:6]), 6)
    assert found.is_threshold_chosen and found.threshold == 0.5


def test_runs_that_never_reach_the_threshold_count_with_the_length_of_the_shortest_run() -> None:
    def run(arm: str, seed: int, values: tuple[float, ...], tokens: float) -> RunCurves:
        training = {"sampled_tokens": dict.fromkeys(range(20), tokens)}
        return curves_of(dict(zip(STEPS, values, strict=True)), arm=arm, seed=str(seed), training=training)

    never, soon = (0.1, 0.2, 0.3, 0.2, 0.2), (0.1, 0.6, 0.3, 0.6, 0.7)
    runs = [run("base", k, soon, 100.0) for k in range(3)] + [
        run("arm", k, never if k else soon, 60.0 + k) for k in range(3)
    ]
    base, arm = compared(runs, threshold=0.5).arms
    assert (base.num_reached, arm.num_reached) == (3, 1)
    assert arm.outcomes["steps_to"].value == pytest.approx((5 + 20 + 20) / 3)
    assert arm.outcomes["tokens_to"].value == pytest.approx((300 + 1200 + 1200) / 3), (
        "the shortest run sampled 1200 tokens"
    )
    assert base.outcomes["tokens_to"].value == 500
    assert (base.num_cut, arm.num_cut) == ({"steps_to": 0, "tokens_to": 0}, {"steps_to": 2, "tokens_to": 2})


def test_durations_beyond_the_shortest_run_are_lower_bounds() -> None:
    def run(arm: str, seed: int, reached_at: int, tokens: float) -> RunCurves:
        training = {"sampled_tokens": dict.fromkeys(range(20), tokens)}
        success = {step: 0.6 if step >= reached_at else 0.1 for step in STEPS}
        return curves_of(success, arm=arm, seed=str(seed), training=training)

    runs = [run("short", k, 10, 100.0) for k in range(3)] + [run("long", k, 20, 1000.0) for k in range(3)]
    found = compared(runs, threshold=0.5)
    short, long = found.arms
    assert (short.num_cut, long.num_cut) == ({"steps_to": 0, "tokens_to": 0}, {"steps_to": 0, "tokens_to": 3})
    (table,) = (each for each in tables(found) if "tokens" in each.columns)
    assert [table.rows["long"][k][0] for k in (0, 1, 2)] == ["3 of 3", show(20.0), f"≥ {show(2000.0)}"]
    assert not table.rows["short"][2][0].startswith("≥")


def test_an_interval_without_0_that_holm_takes_back_is_said_so() -> None:
    """The differences of one arm are such that p lies between 0.05 / 3 and 0.05."""
    base = simulated("base", 0.4, range(5))
    near = [0.005, 0.010, 0.015, 0.020, 0.030]
    runs = [
        curves_of({**b.success, 20: b.success[20] + d}, arm="near", seed=b.seed)
        for b, d in zip(base, near, strict=True)
    ]
    runs += [
        curves_of({**b.success, 20: b.success[20] + d}, arm=a, seed=b.seed)
        for a in "xy"
        for b, d in zip(base, [0.01, -0.01, 0.02, -0.02, 0.0], strict=True)
    ]
    difference = compared(base + runs).differences[0]
    change = difference.outcomes["final"]
    assert change.low > 0 and change.p < 0.05 < change.holm_p and difference.verdict == "no difference shown"
    assert difference.sentence.endswith("after Holm's correction for 3 arms; the interval, by itself, excludes 0.")


def test_holm_takes_the_number_of_arms_into_account() -> None:
    runs = [run for arm in ("base", *"abcdefgh") for run in simulated(arm, 0.4, range(4), noise=0.02)]
    found = compared(runs)
    ps = sorted(each.outcomes["final"].p for each in found.differences)
    adjusted = sorted(each.outcomes["final"].holm_p for each in found.differences)
    assert adjusted[0] == pytest.approx(min(8 * ps[0], 1))
    assert {each.verdict for each in found.differences} == {"no difference shown"}


def test_an_arm_is_paired_with_a_baseline_that_shares_three_seeds() -> None:
    base = simulated("base", 0.4, range(6))
    partly, other = simulated("partly", 0.45, range(3, 9)), simulated("other", 0.45, range(10, 16))
    found = compared(base + partly + other)
    pair, alone = found.differences
    assert (pair.num_pairs, pair.without_partner) == (3, ["6", "7", "8", "0", "1", "2"])
    by_seed = {run.seed: run.success[20] for run in base}
    expected = np.mean([run.success[20] - by_seed[run.seed] for run in partly[:3]])
    assert pair.outcomes["final"].value == pytest.approx(expected)
    assert (alone.num_pairs, alone.without_partner) == (0, []) and "6 and 6 runs, not paired" in alone.sentence
    difference = np.mean([run.success[20] for run in other]) - np.mean([run.success[20] for run in base])
    assert alone.outcomes["final"].value == pytest.approx(difference)


def test_pairs_are_runs_with_the_same_seed_in_any_order() -> None:
    base, arm = simulated("base", 0.4, range(5), of_seeds=0.2), simulated("arm", 0.45, range(5), of_seeds=0.2)
    straight, turned = compared(base + arm), compared(base + arm[::-1])
    for name, change in straight.differences[0].outcomes.items():
        assert turned.differences[0].outcomes[name].value == pytest.approx(change.value)
    assert straight.differences[0].verdict == turned.differences[0].verdict == "better"


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_with_few_seeds_no_interval_is_invented(num_seeds: int) -> None:
    found = compared(simulated("base", 0.4, range(6)) + simulated("arm", 0.9, range(num_seeds)))
    (difference,), arm = found.differences, found.arms[1]
    assert difference.verdict == "no interval"
    runs = "1 complete run of arm" if num_seeds == 1 else "2 complete runs of arm"
    assert (
        f"no interval, since there are {runs} and 6 complete runs of base; 3 of each are needed" in difference.sentence
    )
    assert math.isnan(difference.outcomes["final"].low) and math.isnan(arm.outcomes["final"].low)
    assert np.isnan(arm.curve.low).all() and np.isnan(arm.profile.low).all() and math.isnan(difference.improvement.low)
    assert math.isnan(arm.final_std) == (num_seeds == 1)


def test_runs_without_spread_are_no_finding() -> None:
    runs = [curves_of({0: 0.0, 20: 1.0}, arm=arm, seed=str(seed)) for arm in "ab" for seed in range(4)]
    (difference,) = compared(runs).differences
    assert difference.verdict == "no difference shown" and "without any spread over the runs" in difference.sentence


def test_a_difference_without_spread_has_no_interval() -> None:
    runs = [curves_of({0: 0.0, 20: v}, arm=a, seed=str(s)) for a, v in (("a", 0.25), ("b", 1.0)) for s in range(4)]
    (difference,) = compared(runs).differences
    assert difference.verdict == "no interval"
    assert difference.sentence == (
        "b and a: no interval, since all runs differ by the same (final score, difference +0.750)."
    )


def test_failed_runs_are_counted_and_named() -> None:
    runs = simulated("base", 0.4, range(4)) + simulated("arm", 0.4, range(4))
    stopped = curves_of(
        {0: 0.1, 5: 0.2}, arm="arm", seed="9", steps=20, problem="7 of 20 steps; it died", update_failed=True
    )
    never = curves_of({0: 0.1}, arm="never", seed="0", steps=20, problem="no metrics.jsonl")
    found = compared([*runs, stopped, never], [Unread("seed=-1", "refused")])
    arm = found.arms[1]
    assert (
        arm.failed == ["arm-9: 7 of 20 steps; it died"] and arm.num_diverged == 1 and arm.seeds == ["0", "1", "2", "3"]
    )
    assert found.arms_without_runs == {"never": ["never-0: no metrics.jsonl"]}
    assert found.left_out == [Unread("seed=-1", "refused")]
    with pytest.raises(
        ValueError,
        match=r"--baseline 'never': no such arm \(all its runs are incomplete\), .* the arms are 'base', 'arm'",
    ):
        compared([*runs, never], baseline="never")
    with pytest.raises(ValueError, match=r"no run is complete: arm-9 \(7 of 20 steps; it died\); seed=-1 \(refused\)"):
        compared([stopped], [Unread("seed=-1", "refused")])


def test_a_complete_run_without_its_last_evaluation_is_not_complete() -> None:
    runs = simulated("base", 0.4, range(3))
    cut = curves_of({0: 0.1, 5: 0.2}, arm="base", seed="7", steps=20)
    assert compared([*runs, cut]).arms[0].failed == ["base-7: no evaluation after the last step"]


def test_scores_that_are_no_numbers_are_no_evaluations() -> None:
    runs, nothing = simulated("base", 0.4, range(3)), {0: 0.1, 5: 0.2, 10: 0.2, 15: 0.2, 20: 0.3}
    last, between = (curves_of(nothing | {s: math.nan}, arm="base", seed=str(s)) for s in (20, 5))
    found = compared([*runs, last, between])
    assert found.arms[0].failed == ["base-20: no evaluation after the last step"]
    assert found.steps == [0, 10, 15, 20] and math.isfinite(found.arms[0].outcomes["drawdown"].value)


def test_other_prompts_and_other_steps_are_told_apart() -> None:
    runs = simulated("base", 0.4, range(3))
    longer = curves_of({0: 0.1, 40: 0.2}, arm="longer", seed="0")
    other = curves_of({0: 0.1, 20: 0.2}, arm="other", seed="0", held_out="countdown")
    found = compared([*runs, longer, other])
    assert [arm.name for arm in found.arms] == ["base"]
    assert found.left_out == [
        Unread("longer-0", "40 steps instead of 20"),
        Unread("other-0", "other held-out prompts: countdown instead of level"),
    ]
    assert found.notes[0] == (
        "3 runs of level with 20 steps and the same held-out prompts are compared; "
        "2 with other held-out prompts or another number of steps are not: compare them apart."
    )


def test_two_runs_with_one_seed_are_refused() -> None:
    again = curves_of({0: 0.1, 20: 0.2}, arm="base", seed="1", source="elsewhere")
    with pytest.raises(
        ValueError,
        match=r"two runs of the arm 'base' have the seed 1: base-1 and elsewhere; leave one out, or name a key",
    ):
        compared([*simulated("base", 0.4, range(3)), again])


def test_only_evaluations_that_all_runs_have_are_compared() -> None:
    more = curves_of({0: 0.1, 2: 0.1, 10: 0.2, 20: 0.3}, arm="more", seed="0")
    found = compared([*simulated("base", 0.4, range(3)), more])
    assert found.steps == [0, 10, 20]
    assert "Not all runs were evaluated after the steps 2, 5, 15: these are left out." in found.notes


def test_without_evaluations_the_reward_is_compared() -> None:
    rewards = {step: 0.02 * step for step in range(20)}
    runs = [
        curves_of(
            {},
            seed=str(seed),
            steps=20,
            training={"rollout/reward_mean": {s: r + 0.01 * seed for s, r in rewards.items()}, "sampled_tokens": {}},
        )
        for seed in range(3)
    ]
    found = compared(runs)
    assert found.measure == "rollout/reward_mean" and found.steps == [*range(1, 21)]
    assert found.arms[0].outcomes["final"].value == pytest.approx(0.39)
    assert found.notes[0].startswith("No run was evaluated on held-out prompts: the reward of training is compared")


def test_seconds_of_phases_that_few_steps_have_are_spread_over_all_steps() -> None:
    times = {"time/evaluate_s": {9: 5.0, 19: 5.0}, "time/step_s": dict.fromkeys(range(20), 2.0)}
    runs = [curves_of({0: 0.1, 20: 0.3}, seed=str(s), training=times | {"sampled_tokens": {}}) for s in range(2)]
    assert compared(runs).arms[0].seconds == {"time/evaluate_s": 0.5, "time/step_s": 2.0}


def test_prompts_widen_intervals_and_must_be_the_same() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 0.2, 50)
    runs = []
    for arm, gain in (("base", 0.2), ("arm", 0.4)):
        for seed in range(5):
            scores = {s: 0.2 + gain * s / 20 + difficulty + rng.normal(0, 0.1, 50) for s in STEPS}
            success = {s: float(v.mean()) for s, v in scores.items()}
            runs.append(curves_of(success, arm=arm, seed=str(seed), scores=scores, prompts={"level": 50}))
    found, without = compared(runs), compared([curves_of(dict(r.success), arm=r.arm, seed=r.seed) for r in runs])
    assert (found.num_prompts, without.num_prompts) == (50, 0)
    wide, narrow = (each.arms[0].outcomes["final"] for each in (found, without))
    assert wide.value == pytest.approx(narrow.value) and wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert found.arms[0].curve.value == pytest.approx(without.arms[0].curve.value)
    assert found.differences[0].verdict == "better"
    assert any("evaluation.record_samples" in note for note in without.notes)
    partly = compared([*runs[:-1], curves_of(dict(runs[-1].success), arm="arm", seed="4")])
    assert partly.num_prompts == 0 and any(note.startswith("Not all runs recorded the scores") for note in partly.notes)


def test_scores_of_zero_to_one_have_intervals_inside() -> None:
    values = [0.99, 1.0, 0.93, 1.0]
    (arm,) = compared([curves_of({0: 0.0, 20: v}, seed=str(i)) for i, v in enumerate(values)]).arms
    assert arm.outcomes["final"].high == 1.0 and arm.iqm["final"].high == 1.0 and arm.outcomes["drawdown"].value == 0


def test_a_baseline_that_is_misspelt() -> None:
    runs = simulated("base", 0.4, range(3)) + simulated("arm", 0.4, range(3))
    assert compared(runs, baseline="arm").baseline == "arm"
    with pytest.raises(
        ValueError, match=r"--baseline 'bas': no such arm, did you mean 'base'\?; the arms are 'base', 'arm'"
    ):
        compared(runs, baseline="bas")
