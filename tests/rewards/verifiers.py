"""Verifiers as users write them: one hangs, one raises, one takes its process with it, one its memory."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from sae_rl.rewards.verdict import Sample, Verdict


def fine(prompt: str, response: str, answer: str) -> float:
    return float(response == answer)


def talkative(prompt: str, response: str, answer: str) -> Verdict:
    return Verdict(0.5, f"half of {prompt}", response)


def hang(prompt: str, response: str, answer: str) -> float:
    time.sleep(600)
    return 1.0


def slow(prompt: str, response: str, answer: str) -> float:
    time.sleep(0.1)
    return 1.0


def crash(prompt: str, response: str, answer: str) -> float:
    raise KeyError("no such thing")


def die(prompt: str, response: str, answer: str) -> float:
    os._exit(3)


def words(prompt: str, response: str, answer: str) -> float:
    return "one"  # type: ignore[return-value]


def nan(prompt: str, response: str, answer: str) -> float:
    return float("nan")


def swell(prompt: str, response: str, answer: str) -> float:
    return float(len(bytearray(4 * 10**9)))


HELD: list[bytearray] = []


def hoard(prompt: str, response: str, answer: str) -> float:
    HELD.append(bytearray(3 * 10**8))
    return 1.0


class Status(Exception):
    """With arguments that are not those of its message, so that it cannot be rebuilt from a pickle: a TypeError."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")


class Coded(Exception):
    """The same with another error, a ValueError."""

    def __init__(self, code: str) -> None:
        super().__init__(f"code {int(code)}")


class Mute(Exception):
    def __str__(self) -> str:
        raise AttributeError("no message")


class Locked(Exception):
    """Cannot be pickled in the first place."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


def status(prompt: str, response: str, answer: str) -> float:
    raise Status(503, "busy")


def coded(prompt: str, response: str, answer: str) -> float:
    raise Coded("7")


def mute(prompt: str, response: str, answer: str) -> float:
    raise Mute


def locked(prompt: str, response: str, answer: str) -> float:
    raise Locked


def leaves(prompt: str, response: str, answer: str) -> float:
    raise SystemExit(0)


def wordy(prompt: str, response: str, answer: str) -> float:
    raise ValueError("a" * 10**7)


def half(prompt: str, response: str, answer: str) -> float:
    raise ValueError("half a character: \ud800")


def late(prompt: str, response: str, answer: str) -> float:
    raise TimeoutError("the judge was late")


def listing(prompt: str, response: str, answer: str) -> Verdict:
    return Verdict(1.0, ["equal"])  # type: ignore[arg-type]


class Text(str):
    """Cannot be rebuilt either."""

    def __new__(cls, text: str, length: int) -> Text:
        return super().__new__(cls, text[:length])


def subclass(prompt: str, response: str, answer: str) -> Verdict:
    return Verdict(True, Text("equal, says", 5), Text("yes", 3))


@dataclass(frozen=True)
class Unreadable:
    """A verifier that cannot be rebuilt in the process that checks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)

    def __call__(self, sample: Sample) -> Verdict:
        return Verdict(1.0, "")


@dataclass(frozen=True)
class Deadly:
    """A verifier that ends the process that wants to rebuild it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)

    def __call__(self, sample: Sample) -> Verdict:
        return Verdict(1.0, "")


@dataclass(frozen=True)
class Unsendable:
    """A verifier that cannot be pickled."""

    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, sample: Sample) -> Verdict:
        return Verdict(1.0, "")
