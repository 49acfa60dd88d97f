"""*Level*: keep a drifting level inside a band, and write out every unit step of the way.

The level starts at 0. The prompt names the drifts, ``I0 D+3 I1 D-6 ...``. Step k of the response is::

    I<k> D<c>  (R<remaining> L<level>) * |c|     the drift, copied, then applied unit by unit
    A<a>       (R<remaining> L<level>) * |a|     the correction: the only decision, then applied unit by unit
    V<n>                                         n steps so far ended outside the band

Levels saturate at +-limit. A response of about 260 words holds 12 decisions, and what a decision was worth is
written out up to 16 words later: long enough for segments to mean something, short enough for two cores.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from sae_rl.knobs import Knobs, integer, number
from sae_rl.tasks.task import Problem, Split, check_at_most, draw_from_split


@dataclass(frozen=True, slots=True, kw_only=True)
class Level(Knobs):
    """The task with its knobs. ``random_fraction`` and ``temperature`` set how good its demonstrations are."""

    num_steps: int = integer(12, low=1)
    need: int = integer(6, low=0)  # steps that must end inside the band for a reward
    band: int = integer(2, low=0)
    limit: int = integer(12, low=1)
    min_drift: int = integer(2, low=1)
    max_drift: int = integer(7, low=1)
    actions: tuple[int, ...] = (-8, -5, -3, -1, 1, 3, 5, 8)
    random_fraction: float = number(0.4, low=0, high=1)  # share of demonstrated actions that are uniform
    # The other demonstrated actions follow softmax(-|level after| / temperature).
    temperature: float = number(4.0, low=0, above_low=True)

    name = "level"

    def check_together(self) -> None:
        check_at_most(self, need="num_steps", band="limit", min_drift="max_drift")
        if not 0 < len(self.actions) == len(set(self.actions)) or 0 in self.actions:
            raise ValueError(f"Level.actions = {self.actions}, but it must be distinct numbers other than 0")

    def words(self) -> tuple[str, ...]:
        sizes = range(self.min_drift, self.max_drift + 1)
        drifts = (*(-size for size in reversed(sizes)), *sizes)
        most = max(self.max_drift, *map(abs, self.actions))
        return (
            *(f"I{k}" for k in range(self.num_steps)),
            *(f"D{c:+d}" for c in drifts),
            *(f"A{a:+d}" for a in self.actions),
            *(f"R{r}" for r in range(most)),
            *(f"L{x:+d}" for x in range(-self.limit, self.limit + 1)),
            *(f"V{n}" for n in range(self.num_steps + 1)),
        )

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        def draw(rng: random.Random) -> str:
            drifts = [rng.choice((-1, 1)) * rng.randint(self.min_drift, self.max_drift) for _ in range(self.num_steps)]
            return " ".join(f"I{k} D{c:+d}" for k, c in enumerate(drifts))

        rules = {"need": self.need, "band": self.band, "limit": self.limit, "actions": list(self.actions)}
        return Problem(prompt=draw_from_split(draw, str, seed, split, index), answer=json.dumps(rules))

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        def pick(level: int) -> int:
            if rng.random() < self.random_fraction:
                return rng.choice(self.actions)
            after = [max(-self.limit, min(self.limit, level + a)) for a in self.actions]
            return rng.choices(self.actions, [math.exp(-abs(x) / self.temperature) for x in after])[0]

        return trace(drifts_of(problem.prompt), pick, self.limit, self.band)[0]


def drifts_of(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split() if word.startswith("D")]


def trace(drifts: list[int], pick: Callable[[int], int], limit: int, band: int) -> tuple[str, int]:
    """The response with the decisions ``pick(level)``, and the number of steps that end inside the band."""
    words: list[str] = []
    level, outside = 0, 0

    def apply(change: int) -> None:
        nonlocal level
        sign = 1 if change > 0 else -1
        for remaining in range(abs(change) - 1, -1, -1):
            level = max(-limit, min(limit, level + sign))
            words.extend((f"R{remaining}", f"L{level:+d}"))

    for k, drift in enumerate(drifts):
        words.extend((f"I{k}", f"D{drift:+d}"))
        apply(drift)
        action = pick(level)
        words.append(f"A{action:+d}")
        apply(action)
        outside += abs(level) > band
        words.append(f"V{outside}")
    return " ".join(words), len(drifts) - outside


def steps_inside(prompt: str, response: str, answer: str) -> int | None:
    """The number of steps that end inside the band, or None if the response is not the exact trace of its decisions."""
    rules = json.loads(answer)
    names = {f"A{action:+d}": action for action in rules["actions"]}
    words = response.split()
    actions = [names[word] for word in words if word in names]
    drifts = drifts_of(prompt)
    if len(actions) != len(drifts):
        return None
    decisions = iter(actions)
    implied, inside = trace(drifts, lambda _: next(decisions), rules["limit"], rules["band"])
    return inside if implied.split() == words else None


def level(prompt: str, response: str, answer: str) -> float:
    """1 if the response is an exact trace with enough steps inside the band, else 0."""
    inside = steps_inside(prompt, response, answer)
    return float(inside is not None and inside >= json.loads(answer)["need"])
