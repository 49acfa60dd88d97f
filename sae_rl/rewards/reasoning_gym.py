"""Answers to problems of reasoning-gym, scored as the library scores them."""

from __future__ import annotations

import decimal
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sae_rl.reasoning_gym import lossless_json
from sae_rl.rewards.verdict import Sample, Verdict, shown

MAX_SHOWN = 60  # characters of an answer
# Tasks whose answers are compared as text, without case, and what is wrong with their own scoring function.
COMPARED_AS_TEXT = {"game_of_life_halting": "it takes every text for True that is not empty"}


@dataclass(frozen=True, slots=True)
class ReasoningGym:
    """The score, from 0 to 1, that the task of reasoning-gym gives to the last ``<answer>...</answer>``, or to the response.

    The prompt's answer is what `sae_rl.reasoning_gym.puzzles` wrote: task, knobs and entry. A few tasks give part of the
    score for the right form.
    """

    def read_answer(self, answer: str) -> None:
        """Raises ValueError for an answer that is no problem."""
        _read(answer)

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError for an answer that is no problem, and any exception if a task cannot score its own answer."""
        from reasoning_gym.utils import extract_answer

        task, knobs, entry = _read(sample.answer)
        extracted = extract_answer(sample.response)
        found = sample.response.strip() if extracted is None else extracted
        if task in COMPARED_AS_TEXT:
            score = float(found.casefold() == str(entry["answer"]).casefold())
        else:
            try:
                score = _score(task, knobs, found, entry)
            except MemoryError:
                raise
            except Exception as error:  # many tasks raise on an answer that they cannot parse
                _score(task, knobs, entry["answer"], entry)  # raises if the task cannot score at all
                return Verdict(0.0, f"{task} cannot read the answer: {type(error).__name__}: {error}", found or None)
        answer = entry["answer"] if isinstance(entry["answer"], str) else json.dumps(entry["answer"])
        return Verdict(score, f"{task} gives {score:g}; its own answer: {shown(answer, MAX_SHOWN)}", found or None)


def _score(task: str, knobs: str, answer: Any, entry: dict[str, Any]) -> float:
    with decimal.localcontext():  # some tasks change the precision of all decimals of the process
        return float(_scorer(task, knobs).score_answer(answer, entry))


def _read(answer: str) -> tuple[str, str, dict[str, Any]]:
    """Task, knobs as text, and entry, from a prompt's answer."""
    try:
        problem = lossless_json.loads(answer)
        return problem["task"], lossless_json.dumps(problem["knobs"]), problem["entry"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"reasoning_gym: the answer {shown(answer, MAX_SHOWN)} is no problem of reasoning-gym ({error}); this verifier "
            "is for prompts of a source with name: reasoning_gym"
        ) from error


@lru_cache(maxsize=64)
def _scorer(task: str, knobs: str) -> Any:
    """The task, made once in a process, since some tasks read files."""
    from sae_rl.reasoning_gym.tasks import make_dataset  # imports pydantic, which no other verifier needs

    return make_dataset(task, lossless_json.loads(knobs), seed=0, size=1)
