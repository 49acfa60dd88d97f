"""The verifier of *Level* against a walker that reads a response word by word and knows nothing of traces."""

import json
import random

import pytest

from sae_rl.tasks.level import Level, level, steps_inside

TASK = Level(need=0)


def walk(prompt: str, response: str, limit: int, band: int, actions: tuple[int, ...]) -> int | None:
    """Steps inside the band; None at the first word that the rules do not allow there."""
    drifts = [int(word.removeprefix("D")) for word in prompt.split()[1::2]]
    words = iter(response.split())
    now = inside = outside = 0
    for step, drift in enumerate(drifts):
        if next(words, None) != f"I{step}" or next(words, None) != f"D{drift:+d}":
            return None
        for phase in ("drift", "correction"):
            change = drift
            if phase == "correction":
                word = next(words, "")
                if word not in [f"A{a:+d}" for a in actions]:
                    return None
                change = int(word[1:])
            left = abs(change)
            while left:
                left -= 1
                now += 1 if change > 0 else -1
                now = sorted((-limit, now, limit))[1]
                if next(words, None) != f"R{left}" or next(words, None) != f"L{now:+d}":
                    return None
        if -band <= now <= band:
            inside += 1
        else:
            outside += 1
        if next(words, None) != f"V{outside}":
            return None
    return inside if next(words, None) is None else None


def demonstrations(task: Level, count: int) -> list[tuple[str, str, str]]:
    found = []
    for i in range(count):
        problem = task.problem(3, "train", i)
        found.append((problem.prompt, task.demonstration(problem, random.Random(i)), problem.answer))
    return found


def test_demonstrations_are_consistent_traces() -> None:
    for prompt, response, answer in demonstrations(TASK, 200):
        inside = walk(prompt, response, TASK.limit, TASK.band, TASK.actions)
        assert inside is not None
        assert steps_inside(prompt, response, answer) == inside
        assert level(prompt, response, answer) == 1.0


@pytest.mark.parametrize("need", [0, 3, 6, 12])
def test_reward_counts_steps_inside(need: int) -> None:
    scores = []
    for prompt, response, answer in demonstrations(Level(need=need), 100):
        inside = walk(prompt, response, 12, 2, TASK.actions)
        assert level(prompt, response, answer) == float(inside is not None and inside >= need)
        scores.append(level(prompt, response, answer))
    assert (need in (0, 12)) or 0 < sum(scores) < len(scores)


def test_every_single_word_change_of_a_short_trace_scores_0() -> None:
    task = Level(num_steps=3, need=0, limit=4)  # a low limit, so that saturation is met often
    for prompt, response, answer in demonstrations(task, 3):
        words = response.split()
        for position, original in enumerate(words):
            for other in (*task.words(), "A+4", "nonsense"):
                if other != original:
                    changed = " ".join([*words[:position], other, *words[position + 1 :]])
                    assert walk(prompt, changed, 4, task.band, task.actions) is None
                    assert level(prompt, changed, answer) == 0.0


def test_damaged_traces_score_0() -> None:
    rng = random.Random(0)
    for prompt, response, answer in demonstrations(TASK, 20):
        words = response.split()
        for _ in range(50):
            i = rng.randrange(len(words))
            for damaged in (
                words[:i] + words[i + 1 :],
                [*words[:i], words[i], *words[i:]],
                words[:i],
                words + words[: i + 1],
                [*words[:i], rng.choice([w for w in TASK.words() if w != words[i]]), *words[i + 1 :]],
            ):
                assert level(prompt, " ".join(damaged), answer) == 0.0
    assert level(prompt, "", answer) == 0.0


def test_another_decision_with_its_own_consequences_is_valid() -> None:
    problem = TASK.problem(0, "train", 0)
    responses = {TASK.demonstration(problem, random.Random(i)) for i in range(50)}
    assert len(responses) == 50
    assert all(level(problem.prompt, response, problem.answer) == 1.0 for response in responses)


def test_a_trace_of_another_problem_scores_0() -> None:
    (prompt, _, answer), (_, response, _) = demonstrations(TASK, 2)
    assert level(prompt, response, answer) == 0.0


def test_problems_depend_on_seed_split_and_index_alone() -> None:
    last = TASK.problem(5, "held_out", 77)
    assert last == [TASK.problem(5, "held_out", i) for i in range(78)][77]
    assert last != TASK.problem(6, "held_out", 77)
    assert last != TASK.problem(5, "train", 77)
    # Frozen: a change here silently changes every published curve.
    assert TASK.problem(0, "train", 0).prompt == FIRST_PROMPT
    assert json.loads(TASK.problem(0, "train", 0).answer)["need"] == 0


FIRST_PROMPT = "I0 D+5 I1 D+3 I2 D-3 I3 D+5 I4 D+6 I5 D-4 I6 D+4 I7 D-2 I8 D+7 I9 D-2 I10 D-6 I11 D-7"


def test_splits_are_disjoint_whatever_the_seed() -> None:
    task = Level(num_steps=2, need=1)  # 144 problems: splits by number alone would collide at once
    train = {task.problem(seed, "train", i).prompt for seed in range(4) for i in range(200)}
    held_out = {task.problem(seed, "held_out", i).prompt for seed in range(4) for i in range(200)}
    assert train and held_out
    assert not train & held_out


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_steps": 0}, "Level.num_steps = 0, but it must be an integer of at least 1"),
        ({"need": 13}, "Level.need = 13, but it must be at most num_steps = 12"),
        ({"band": -1}, "Level.band"),
        ({"min_drift": 9}, "Level.min_drift"),
        ({"actions": (1, 0)}, "Level.actions"),
        ({"actions": ()}, "Level.actions"),
        ({"random_fraction": 1.5}, "Level.random_fraction"),
        ({"temperature": 0.0}, "Level.temperature"),
    ],
)
def test_knobs_are_checked(knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Level(**knobs)


def test_unknown_split_and_negative_index_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed are 'train' and 'held_out'"):
        TASK.problem(0, "test", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found -1"):
        TASK.problem(0, "train", -1)
