"""What a verifier is given, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response and what it is checked against."""

    prompt: str  # as the model read it
    response: str
    answer: str  # ground truth, in the form that the verifier understands
    num_tokens: int = 0  # of the response
    truncated: bool = False  # cut at the length limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """How good a response is, and why."""

    score: float  # finite; 1 is right and 0 wrong, unless the verifier says otherwise
    why: str  # for a person who reads the samples
    answer: str | None = None  # what the response answers: answers that mean the same are the same text; None: nothing


@dataclass(frozen=True, slots=True)
class Failed:
    """A check without a verdict: it crashed, overran its deadline or its memory. Not a wrong answer."""

    why: str


@runtime_checkable
class Verifier(Protocol):
    """A program that judges responses. Members of `VERIFIERS` are frozen dataclasses whose fields are their knobs."""

    def __call__(self, sample: Sample) -> Verdict:
        """Raises whatever stops it from judging: that is a failed check."""
        ...


class Longest(NamedTuple):
    """The longest that a check may take by a verifier's own time limits."""

    seconds: float
    knobs: str  # that it comes from


@runtime_checkable
class Timed(Protocol):
    """A verifier with time limits of its own: beyond them it says what was late, if ``rewards.deadline_s`` lets it."""

    def longest(self) -> Longest: ...
