"""*Countdown-near*: come close to a target with three of five numbers and two operations, in a few attempts.

The prompt is ``4 1 7 3 9 to 47``; an attempt is ``9 * 7 = 63 , 63 - 4 = 59 : 12 ;``, where the number after the colon
is the distance to the target. Only the last attempt counts: it must be correct and within ``near`` of the target. A
response holds at most ``max_attempts`` attempts, so the decisions are the numbers, the operations, and when to stop.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import permutations, product

from sae_rl.knobs import Knobs, integer, number
from sae_rl.tasks.task import Problem, Split, check_at_most, draw_from_split

OPERATIONS = ("+", "-", "*")
LARGEST = 99  # results outside 0..LARGEST have no word
NUMBERS = {str(n): n for n in range(LARGEST + 1)}
ATTEMPT_WORDS = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Countdown(Knobs):
    """The task with its knobs. ``greedy_fraction`` sets how good its demonstrations are."""

    num_numbers: int = integer(5, low=3, high=8)
    max_number: int = integer(9, low=1, high=LARGEST)
    min_target: int = integer(10, low=0)
    max_target: int = integer(60, low=0, high=LARGEST)
    near: int = integer(2, low=0)  # the largest rewarded distance
    max_attempts: int = integer(5, low=1)
    # The share of demonstrated attempts that are the best possible; the others are random.
    greedy_fraction: float = number(0.0, low=0, high=1)

    name = "countdown"

    def check_together(self) -> None:
        check_at_most(self, min_target="max_target")

    def words(self) -> tuple[str, ...]:
        return (*NUMBERS, *OPERATIONS, "=", ",", ":", ";", "to")

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        def draw(rng: random.Random) -> tuple[list[int], int]:
            for _ in range(1000):
                numbers = [rng.randint(1, self.max_number) for _ in range(self.num_numbers)]
                results = {r for *_, r in attempts(numbers) if self.min_target <= r <= self.max_target}
                if results:
                    return numbers, rng.choice(sorted(results))
            raise ValueError(
                f"countdown: no target from {self.min_target} to {self.max_target} can be reached with "
                f"numbers up to {self.max_number}; raise countdown.max_number or widen the targets"
            )

        def key(problem: tuple[list[int], int]) -> str:  # problems are the same if only the order of numbers differs
            return f"{sorted(problem[0])} {problem[1]}"

        numbers, target = draw_from_split(draw, key, seed, split, index)
        rules = {"near": self.near, "max_attempts": self.max_attempts}
        return Problem(prompt=f"{' '.join(map(str, numbers))} to {target}", answer=json.dumps(rules))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        numbers, target = read_prompt(problem.prompt)
        possible = attempts(numbers)
        best = min(possible, key=lambda attempt: abs(attempt[-1] - target))
        words: list[str] = []
        for _ in range(self.max_attempts):
            a, first, b, between, second, c, result = (
                best if rng.random() < self.greedy_fraction else rng.choice(possible)
            )
            distance = abs(result - target)
            words.append(f"{a} {first} {b} = {between} , {between} {second} {c} = {result} : {distance} ;")
            if distance <= self.near:
                break
        return " ".join(words)


def read_prompt(prompt: str) -> tuple[list[int], int]:
    *numbers, _, target = prompt.split()
    return [int(n) for n in numbers], int(target)


def calculate(a: int, operation: str, b: int) -> int | None:
    """The result, or None if the vocabulary has no word for it."""
    result = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return result if 0 <= result <= LARGEST else None


def attempts(numbers: list[int]) -> list[tuple[int, str, int, int, str, int, int]]:
    """Every different (a, operation, b, result of both, operation, c, result) that the numbers allow."""
    found = []
    for (a, b, c), (first, second) in product(sorted(set(permutations(numbers, 3))), product(OPERATIONS, repeat=2)):
        between = calculate(a, first, b)
        result = None if between is None else calculate(between, second, c)
        if between is not None and result is not None:
            found.append((a, first, b, between, second, c, result))
    return found


def countdown(prompt: str, response: str, answer: str) -> float:
    """1 if the last attempt is correct, uses each given number at most once, and is near the target; else 0."""
    rules = json.loads(answer)
    numbers, target = read_prompt(prompt)
    words = response.split()
    num_attempts, rest = divmod(len(words), ATTEMPT_WORDS)
    if rest or not 1 <= num_attempts <= rules["max_attempts"]:
        return 0.0
    match words[-ATTEMPT_WORDS:]:
        case [a, first, b, "=", between, ",", again, second, c, "=", result, ":", distance, ";"]:
            values = [NUMBERS.get(word) for word in (a, b, c, between, again, result, distance)]
        case _:
            return 0.0
    if not {first, second} <= set(OPERATIONS) or None in values:
        return 0.0
    x, y, z, x_y, x_y_again, x_y_z, apart = (value for value in values if value is not None)
    correct = (
        Counter((x, y, z)) <= Counter(numbers)
        and calculate(x, first, y) == x_y == x_y_again
        and calculate(x_y, second, z) == x_y_z
        and abs(x_y_z - target) == apart
    )
    return float(correct and apart <= rules["near"])
