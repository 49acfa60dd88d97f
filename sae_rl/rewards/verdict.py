"""What a verifier gets, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response, and the right answer to its prompt."""

    prompt: str  # as the model read it
    response: str  # what the policy answered
    answer: str  # the right answer, in the form that the verifier reads
    num_tokens: int = 0  # length of the response
    truncated: bool = False  # the response was cut off at the length limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """How good a response is, and why."""

    score: float  # finite; most verifiers return 1 for right and 0 for wrong
    why: str  # the reason, for people who read the samples
    answer: str | None = None  # what the response answers, equal answers as equal text, for votes; None: no answer


@dataclass(frozen=True, slots=True)
class Failed:
    """A check without a verdict: it crashed, or exceeded its deadline or its memory. The response need not be wrong."""

    why: str


def shown(text: str, most: int = 80) -> str:
    """A text in quotes, as messages show it: cut off after ``most`` characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= most else f"{quoted[: most - 3]}..."


@runtime_checkable
class Verifier(Protocol):
    """A program that scores responses. Members of `VERIFIERS` are frozen dataclasses whose fields are their knobs."""

    def __call__(self, sample: Sample) -> Verdict:
        """Every exception is a failed check."""
        ...


class TimeLimit(NamedTuple):
    """The longest time that a verifier allows itself for one check."""

    seconds: float
    knobs: str  # names of the knobs that set it


@runtime_checkable
class Timed(Protocol):
    """A verifier with a time limit of its own: if that ends before ``rewards.deadline_s``, it can say what was late."""

    def time_limit(self) -> TimeLimit: ...


@runtime_checkable
class ReadsAnswers(Protocol):
    """A verifier that can say before any response whether it can read the right answer to a prompt."""

    def read_answer(self, answer: str) -> object:
        """Raises ValueError if no response could be right."""
        ...
