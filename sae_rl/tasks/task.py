"""The protocol of a procedural task, and its two splits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from sae_rl.settings import BadKeys

T = TypeVar("T")
Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 8  # one problem in eight belongs to the held-out split
MAX_DRAWS = 10_000  # attempts to draw one problem of a split
MAX_BARREN_DRAWS = 1000  # draws in a row without a new problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A prompt, and the answer that its verifier reads."""

    prompt: str  # what the model reads
    answer: str  # what the verifier compares a response with


class Task(Protocol):
    """Problems that a program writes and a program checks.

    Prompts and responses are words separated by single spaces. The verifier is that of the same name in
    `sae_rl.rewards.table.READY`.
    """

    @property
    def name(self) -> str: ...

    def words(self) -> tuple[str, ...]:
        """The vocabulary of prompts and responses, in the order of token ids."""
        ...

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        """Problem ``index`` of a split. Only the arguments and the task's knobs decide it."""
        ...

    def demonstration(self, problem: Problem, rng: random.Random) -> str:
        """A response in the right format, as good as a base policy should be."""
        ...


def check_at_most(task: Any, **limits: str) -> None:
    """Raises ValueError if a knob, ``knob="limit"``, is above the knob that limits it."""
    for knob, limit in limits.items():
        found, allowed = getattr(task, knob), getattr(task, limit)
        if found > allowed:
            raise ValueError(f"{type(task).__name__}.{knob} = {found}, but it must be at most {limit} = {allowed}")


def split_of(key: str) -> Split:
    """The split of a problem. A hash of its content decides, so the splits of different seeds share no problem."""
    return "held_out" if hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_SHARE == 0 else "train"


def draw_from_split(
    draw: Callable[[random.Random], T], key: Callable[[T], str], seed: int, split: Split, index: int
) -> T:
    """Calls ``draw`` until the problem belongs to ``split``. Raises BadKeys after `MAX_DRAWS` attempts."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split: found {split!r}, allowed are 'train' and 'held_out'")
    if index < 0:
        raise ValueError(f"index: found {index}, allowed are numbers from 0")
    rng = random.Random(f"{seed}/{split}/{index}")
    for _ in range(MAX_DRAWS):
        problem = draw(rng)
        if split_of(key(problem)) == split:
            return problem
    raise BadKeys(f"knobs: {MAX_DRAWS} draws in a row gave no problem of split {split}; choose knobs that allow more")
