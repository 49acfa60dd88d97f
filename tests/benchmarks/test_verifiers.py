"""The benchmark of verifiers: its answers are what they are called, and its figures too."""

import pytest

from benchmarks import verifiers


def test_the_workload_is_mixed_repeatable_and_labelled() -> None:
    made = verifiers.make(800, seed=3)
    assert [(r.text, right) for r, right in made] == [(r.text, right) for r, right in verifiers.make(800, seed=3)]
    assert made[0][0].text != verifiers.make(800, seed=4)[0][0].text
    assert sum(right for _, right in made) / len(made) == pytest.approx(1 - verifiers.WRONG_FRACTION, abs=0.06)
    answers = {rollout.prompt.answer for rollout, _ in made}
    assert len(answers) > 80
    for sign in ("\\frac", "\\sqrt", "x^2", "(", "[", "\\{", "."):
        assert any(sign in answer for answer in answers), sign


def test_every_program_judges_the_same_answers() -> None:
    results = verifiers.measure(num_answers=60, rounds=1)
    assert set(results["programs"]) == {verifiers.PEER, verifiers.DIRECT, *verifiers.POOLS.values()}
    for name, one in results["programs"].items():
        assert len(one["seconds"]) == 1
        assert one["wrong_verdicts"] == 0.0 if name != verifiers.PEER else one["wrong_verdicts"] < 0.1


def test_ratios_are_of_best_times() -> None:
    seconds = {verifiers.PEER: [6.0, 4.0], verifiers.DIRECT: [2.0, 3.0]}
    found = verifiers.summarize(100, seconds, dict.fromkeys(seconds, 0.0))["programs"][verifiers.DIRECT]
    assert (found["best_s"], found["times_math_verify"], found["answers_per_s"]) == (2.0, 2.0, 50.0)
