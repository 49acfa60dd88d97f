"""The verifier of *Countdown-near* against Python's own arithmetic."""

import random
import re

import pytest

from sae_rl.tasks.countdown import LARGEST, Countdown, countdown

TASK = Countdown()


def judge(prompt: str, response: str, near: int, max_attempts: int) -> float:
    """The same rules by regular expressions and `eval`."""
    numbers, target = prompt.split(" to ")
    pieces = re.findall(r"[^;]*;|[^;]+$", response)
    shape = r"(\d+) ([-+*]) (\d+) = (\d+) , (\d+) ([-+*]) (\d+) = (\d+) : (\d+) ;"
    if not 1 <= len(pieces) <= max_attempts or any(len(piece.split()) != 14 for piece in pieces):
        return 0.0
    match = re.fullmatch(shape, pieces[-1].strip())
    if match is None or any(len(n) > 1 and n[0] == "0" for n in match.groups()):
        return 0.0
    a, first, b, between, again, second, c, result, distance = match.groups()
    left = numbers.split()
    for number in (a, b, c):
        if number not in left:
            return 0.0
        left.remove(number)
    right = (
        eval(f"{a}{first}{b}") == int(between)
        and between == again
        and eval(f"{between}{second}{c}") == int(result)
        and abs(int(result) - int(target)) == int(distance)
        and max(int(between), int(result)) <= LARGEST
    )
    return float(right and int(distance) <= near)


def test_demonstrations_are_judged_alike_and_some_succeed() -> None:
    scores = []
    for i in range(300):
        problem = TASK.problem(1, "train", i)
        response = TASK.demonstration(problem, random.Random(i))
        assert set(problem.prompt.split()) | set(response.split()) <= set(TASK.words())
        scores.append(countdown(problem.prompt, response, problem.answer))
        assert scores[-1] == judge(problem.prompt, response, TASK.near, TASK.max_attempts)
    assert 0.1 < sum(scores) / len(scores) < 0.6


def test_changed_words_are_judged_alike() -> None:
    rng = random.Random(0)
    for i in range(100):
        problem = TASK.problem(2, "train", i)
        words = TASK.demonstration(problem, rng).split()
        for position in range(len(words) - 14, len(words)):
            changed = list(words)
            changed[position] = rng.choice(TASK.words())
            response = " ".join(changed)
            assert countdown(problem.prompt, response, problem.answer) == judge(problem.prompt, response, 2, 5)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("5 * 7 = 35 , 35 + 3 = 38 : 1 ;", 1.0),
        ("5 * 7 = 35 , 35 + 4 = 39 : 0 ;", 1.0),
        ("1 + 1 = 9 , 9 + 9 = 9 : 9 ; 5 * 7 = 35 , 35 + 4 = 39 : 0 ;", 1.0),  # only the last attempt counts
        ("5 * 7 = 35 , 35 + 4 = 39 : 0 ; 5 + 7 = 12 , 12 + 4 = 16 : 23 ;", 0.0),
        ("5 * 7 = 35 , 35 + 5 = 40 : 1 ;", 0.0),  # there is one 5
        ("5 * 7 = 35 , 35 + 9 = 44 : 5 ;", 0.0),  # no 9
        ("5 * 7 = 36 , 36 + 3 = 39 : 0 ;", 0.0),  # wrong product
        ("5 * 7 = 35 , 34 + 4 = 38 : 1 ;", 0.0),  # another number goes on
        ("5 * 7 = 35 , 35 + 3 = 38 : 0 ;", 0.0),  # wrong distance
        ("5 * 7 = 35 , 35 + 4 = 39 : 00 ;", 0.0),
        ("5 * 7 = 35 , 35 + ٤ = 39 : 0 ;", 0.0),
        ("5 * 7 = 35 , 35 + 4 = 39 : 0", 0.0),
        ("5 / 7 = 35 , 35 + 4 = 39 : 0 ;", 0.0),
        ("9" * 5000, 0.0),
        ("", 0.0),
        (" ".join(["5 * 7 = 35 , 35 + 4 = 39 : 0 ;"] * 6), 0.0),  # six attempts
    ],
)
def test_known_cases(response: str, score: float) -> None:
    assert countdown("5 7 8 4 3 to 39", response, '{"near": 2, "max_attempts": 5}') == score


def test_splits_are_disjoint_and_reproducible() -> None:
    def content(prompt: str) -> tuple:
        numbers, target = prompt.split(" to ")
        return (*sorted(numbers.split()), target)

    train = {content(TASK.problem(0, "train", i).prompt) for i in range(500)}
    assert not train & {content(TASK.problem(1, "held_out", i).prompt) for i in range(100)}
    assert TASK.problem(4, "train", 9) == TASK.problem(4, "train", 9)


def test_knobs_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Countdown\.num_numbers = 2, but it must be an integer from 3 to 8"):
        Countdown(num_numbers=2)
    with pytest.raises(ValueError, match="no target from 97 to 97 can be reached"):
        Countdown(max_number=1, min_target=97, max_target=97).problem(0, "train", 0)
