"""Tasks of reasoning-gym: problems that repeat, splits that share nothing, and scores as the task's own rules give them.

A run tries the tasks with known trouble and some others, which change from day to day. ``SAE_RL_NIGHTLY=1`` tries all
tasks; ``SAE_RL_TASKS_OF=2026-01-31`` tries those of another day.
"""

from __future__ import annotations

import decimal
import json
import os
import random
from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_rl.reasoning_gym import lossless_json
from sae_rl.reasoning_gym.puzzles import PuzzleProcess, Puzzles, draw_problems
from sae_rl.reasoning_gym.tasks import knobs_at, make_dataset
from sae_rl.rewards.reasoning_gym import COMPARED_AS_TEXT, ReasoningGym
from sae_rl.rewards.verdict import Sample
from sae_rl.settings import BadKeys
from sae_rl.tasks.task import Problem, split_of

from .reasoning_gym_cases import CASES

# Tasks without one right answer, and the key of an entry's metadata that holds one; None: no key does.
EXAMPLES = {
    "boxnet": None,
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
    "rush_hour": None,
}
NO_CURRICULUM = {"acre", "composite", "gsm_symbolic", "list_functions"}
# Tasks that refuse higher levels of their own curriculum, and the highest level that they take.
HIGHEST = {"caesar_cipher": 1, "knight_swap": None, "rubiks_cube": 3, "survo": 1}
# Ordinary JSON, other hashes of text, or the task's own rule break these tasks.
TROUBLED = {
    *("codeio", "game_of_life_halting", "graph_color", "gsm_symbolic", "isomorphic_strings", "knights_knaves"),
    *("list_functions", "polynomial_multiplication", "prime_factorization", "ransom_note", "rearc"),
}
SAMPLED = 4
DAY = os.environ.get("SAE_RL_TASKS_OF", date.today().isoformat())
COMPOSITE = {"datasets": [{"name": name, "weight": 1.0, "config": {}} for name in ("chain_sum", "leg_counting")]}


def tasks_of_this_run(troubled: set[str]) -> list[str]:
    from reasoning_gym.factory import DATASETS

    names = sorted(DATASETS)
    if os.environ.get("SAE_RL_NIGHTLY"):
        return names
    others = [task for task in names if task not in troubled]
    return sorted(troubled | set(random.Random(DAY).sample(others, SAMPLED)))


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[PuzzleProcess, PuzzleProcess]]:
    with closing(PuzzleProcess()) as one, closing(PuzzleProcess()) as other:
        yield one, other


def score(problem: Problem, answer: str) -> float:
    return ReasoningGym()(Sample(prompt=problem.prompt, response=answer, answer=problem.answer)).score


def entry_of(problem: Problem) -> dict[str, Any]:
    entry: dict[str, Any] = lossless_json.loads(problem.answer)["entry"]
    return entry


@pytest.mark.parametrize("task", tasks_of_this_run(TROUBLED))
def test_a_task(task: str, processes: tuple[PuzzleProcess, PuzzleProcess]) -> None:
    print(f"SAE_RL_TASKS_OF={DAY}")  # pytest shows it with a failure
    knobs = COMPOSITE if task == "composite" else {}
    wanted = [
        Puzzles(task=task, num_prompts=3, knobs=knobs),
        Puzzles(task=task, num_prompts=1, knobs=knobs, split="held_out", seed=1),
    ]
    train, heldout = (processes[0].draw(source) for source in wanted)
    # In the other order: a problem depends on nothing that was drawn before it.
    assert [processes[1].draw(source) for source in reversed(wanted)] == [heldout, train]
    assert len({problem.prompt for problem in train}) == 3
    assert {split_of(p.prompt) for p in train} == {"train"} and split_of(heldout[0].prompt) == "held_out"
    for problem in (*train, *heldout):
        entry = entry_of(problem)
        assert entry["question"] == problem.prompt
        right = entry["answer"]
        if task in EXAMPLES:
            assert right is None or task == "rubiks_cube" or task == "rush_hour"
            found = EXAMPLES[task] and entry["metadata"][EXAMPLES[task]]
            right = json.dumps(found) if isinstance(found, dict) else found
        if right is not None:
            assert score(problem, f"So it is\n<answer>{right}</answer>") == 1.0
        for wrong in ("So it is <answer>wrong zzz</answer>", "<answer>()</answer>", "no answer"):
            assert score(problem, wrong) < 1.0


def test_all_tasks_that_there_are() -> None:
    from reasoning_gym.factory import CURRICULA, DATASETS

    assert len(DATASETS) == 106
    assert set(DATASETS) - set(CURRICULA) == NO_CURRICULUM
    assert set(COMPARED_AS_TEXT) | set(EXAMPLES) <= set(DATASETS)


@pytest.mark.parametrize("task", tasks_of_this_run(set(HIGHEST)))
def test_a_curriculum_gives_knobs_that_its_task_takes(task: str) -> None:
    from reasoning_gym.factory import CURRICULA

    print(f"SAE_RL_TASKS_OF={DAY}")
    if task in NO_CURRICULUM:
        pytest.skip("a task without curriculum")

    attributes = CURRICULA[task]().attributes
    if not attributes:
        pytest.skip("a curriculum without attributes")
    highest = max(len(attribute.levels) for attribute in attributes.values()) - 1
    easy, hard = knobs_at(task, {}, 0), knobs_at(task, {}, highest)
    assert easy.keys() == hard.keys() and (easy != hard or highest == 0)
    if (most := HIGHEST.get(task, highest)) != highest:
        with pytest.raises(BadKeys, match=f"{task} refuses them"):
            make_dataset(task, knobs_at(task, {}, 0 if most is None else most + 1), seed=0, size=10)
    for level in () if most is None else (0, most):
        make_dataset(task, knobs_at(task, {}, level), seed=0, size=10)
    first = next(iter(attributes))
    assert knobs_at(task, {}, {first: 0}).items() <= easy.items()


@pytest.mark.parametrize(("task", "part", "answer", "expected"), CASES)
def test_scores_are_those_that_reasoning_gym_publishes(
    task: str, part: dict[str, Any], answer: str, expected: float
) -> None:
    entry = {"question": "", "answer": None, "metadata": {}} | part
    text = lossless_json.dumps({"task": task, "knobs": {}, "entry": entry})
    problem = Problem(prompt="", answer=text)
    assert score(problem, answer) == expected
    assert score(problem, f"<answer>nothing</answer> or rather <answer> {answer} </answer>") == expected


def test_the_knobs_of_a_source_reach_the_rule_that_scores() -> None:
    strict = Puzzles(task="decimal_arithmetic", num_prompts=1, knobs={"precision": 5})
    (problem,) = draw_problems(strict)
    assert lossless_json.loads(problem.answer)["knobs"] == {"precision": 5}
    (board,) = draw_problems(Puzzles(task="arc_1d", num_prompts=1))
    assert score(board, entry_of(board)["answer"]) == 1.0


def test_knobs_of_other_types_are_read_from_text() -> None:
    times = make_dataset("time_intervals", {"min_date": "2001-02-03", "task_types": ["date"]}, seed=0, size=1)
    assert times.config.min_date == date(2001, 2, 3)
    words = make_dataset("word_sorting", {"transformation": "uppercase"}, seed=0, size=1)
    assert words[0]["answer"].isupper()
    with pytest.raises(BadKeys, match=r"word_sorting refuses them: transformation: found 'louder': input should be"):
        make_dataset("word_sorting", {"transformation": "louder"}, seed=0, size=1)


def test_the_first_problems_of_more_are_the_same() -> None:
    few, more = (draw_problems(Puzzles(task="chain_sum", num_prompts=n)) for n in (5, 700))
    assert more[:5] == few
    assert len({problem.prompt for problem in more}) == 700
    other = draw_problems(Puzzles(task="chain_sum", num_prompts=5, seed=1))
    assert not {p.prompt for p in other} & {p.prompt for p in few}


def test_splits_share_nothing_whatever_the_seeds() -> None:
    knobs = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train = draw_problems(Puzzles(task="chain_sum", num_prompts=100, knobs=knobs))
    heldout = draw_problems(Puzzles(task="chain_sum", num_prompts=10, knobs=knobs, split="held_out", seed=7))
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}


def test_a_task_that_is_too_small_says_so() -> None:
    knobs = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(BadKeys, match=r"chain_sum has (\d+) different problems in split held_out") as error:
        draw_problems(Puzzles(task="chain_sum", num_prompts=50_000, knobs=knobs, split="held_out"))
    assert "lower num_prompts" in str(error.value)


def test_an_answer_that_a_rule_cannot_read_is_wrong_and_a_broken_rule_is_a_failed_check() -> None:
    (problem,) = draw_problems(Puzzles(task="prime_factorization", num_prompts=1))
    verdict = ReasoningGym()(Sample(prompt="", response="two and five", answer=problem.answer))
    assert verdict.score == 0.0 and "cannot read the answer: ValueError" in verdict.why
    broken = {"task": "number_format", "knobs": {}, "entry": {"question": "", "answer": "1", "metadata": {}}}
    with pytest.raises(KeyError):
        ReasoningGym()(Sample(prompt="", response="1", answer=lossless_json.dumps(broken)))
    with pytest.raises(ValueError, match=r"the answer '42' is no problem of reasoning-gym"):
        ReasoningGym()(Sample(prompt="", response="1", answer="42"))


def test_what_a_verdict_says() -> None:
    (problem,) = draw_problems(Puzzles(task="chain_sum", num_prompts=1))
    right = entry_of(problem)["answer"]
    verdict = ReasoningGym()(Sample(prompt="", response=f" {right} \n", answer=problem.answer))
    assert (verdict.score, verdict.answer) == (1.0, right)
    assert verdict.why == f"chain_sum gives 1; its own answer: {right!r}"
    assert ReasoningGym()(Sample(prompt="", response=" ", answer=problem.answer)).answer is None


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.fractions() | st.dates()
    | st.datetimes() | st.times() | st.timedeltas() | st.decimals(allow_nan=False) | st.complex_numbers(allow_nan=False)
)  # fmt: skip
keys = st.text() | st.integers() | st.floats(allow_nan=False) | st.tuples(st.integers(), st.text())
values = st.recursive(
    leaves, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner), max_leaves=20
)


def same_types(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return all(same_types(a, c) and same_types(b, d) for (a, b), (c, d) in pairs)
    return not isinstance(one, list | tuple) or all(same_types(a, b) for a, b in zip(one, other, strict=True))


@settings(deadline=None)  # the time is the machine's
@given(values)
def test_lossless_json_gives_back_what_it_was_given(value: Any) -> None:
    again = lossless_json.loads(lossless_json.dumps(value))
    assert again == value and same_types(again, value)


def test_lossless_json_of_rarer_values() -> None:
    value = {"__type__": "mine", "sets": [{1, 2}, frozenset("ab")], "n": (Fraction(1, 3), Decimal("0.10"), 1j)}
    assert lossless_json.loads(lossless_json.dumps(value)) == value
    when = [datetime(2020, 1, 2, 3), date(2020, 1, 2), time(3, 4), timedelta(days=-1, microseconds=3)]
    assert lossless_json.loads(lossless_json.dumps(when)) == when
    assert lossless_json.loads(lossless_json.dumps([np.float64(0.5), np.int64(3), np.str_("x")])) == [0.5, 3, "x"]
    with pytest.raises(TypeError, match=r"value.a\[1\] is builtins.object, which has no form"):
        lossless_json.dumps({"a": [1, object()]})
    with pytest.raises(ValueError, match="'chair' is unknown"):
        lossless_json.loads('{"__type__": "chair", "of": 1}')


def test_drawing_and_scoring_leave_decimals_as_they_were() -> None:
    before = decimal.getcontext().prec
    for task in ("decimal_arithmetic", "decimal_chain_sum"):
        (problem,) = draw_problems(Puzzles(task=task, num_prompts=1))
        assert decimal.getcontext().prec == before
        assert score(problem, str(entry_of(problem)["answer"])) == 1.0
        assert decimal.getcontext().prec == before
