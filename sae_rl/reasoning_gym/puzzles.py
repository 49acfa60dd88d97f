"""Draws problems of reasoning-gym (arXiv 2505.24760) in a process of their own, so that they depend on their arguments only.

Some tasks of reasoning-gym order things by the hash of text, read the global random numbers, or set the precision of all
decimals, and some searches take very long. The process has fixed hashes. For every problem it seeds the random numbers,
restores the precision of decimals, and sets a deadline.
"""

from __future__ import annotations

import contextlib
import decimal
import multiprocessing
import os
import random
import signal
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pebble import ProcessExpired, ProcessPool

from sae_rl.reasoning_gym import lossless_json
from sae_rl.reasoning_gym.tasks import knobs_at, make_dataset
from sae_rl.seeds import derive_seed
from sae_rl.settings import BadKeys
from sae_rl.tasks.task import MAX_BARREN_DRAWS, Problem, Split, split_of

CHUNK = 500  # problems of one data set of reasoning-gym; more problems come from more data sets
DRAW_LIMIT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzles:
    """The problems to draw: the first ``num_prompts`` different ones of a task that belong to a split."""

    task: str
    num_prompts: int
    knobs: Mapping[str, Any] = field(default_factory=dict)
    levels: Mapping[str, int] | int | None = None  # see `knobs_at`
    split: Split = "train"
    seed: int = 0


def draw_problems(source: Puzzles) -> list[Problem]:
    """Draws the problems in this process, where some tasks do not repeat; `PuzzleProcess` always gives the same ones.

    Raises:
        BadKeys: the task, its knobs or its levels are wrong, or there are fewer different problems.
    """
    knobs = knobs_at(source.task, source.knobs, source.levels)
    found: list[Problem] = []
    seen: set[str] = set()
    barren, last_error = 0, ""
    for entry in _entries(source, knobs):
        barren += 1
        if isinstance(entry, Exception):
            last_error = f"; the last draw that failed: {type(entry).__name__}: {entry}"
        elif entry["question"] not in seen:
            seen.add(entry["question"])
            if split_of(entry["question"]) == source.split:
                barren = 0
                answer = lossless_json.dumps({"task": source.task, "knobs": knobs, "entry": entry})
                found.append(Problem(prompt=entry["question"], answer=answer))
                if len(found) == source.num_prompts:
                    return found
        if barren == MAX_BARREN_DRAWS:
            break
    raise BadKeys(
        f"num_prompts = {source.num_prompts}: with these knobs {source.task} has {len(found)} different problems in split "
        f"{source.split}, or hardly more ({MAX_BARREN_DRAWS} draws in a row gave no other); lower num_prompts, or choose "
        f"knobs that allow more{last_error}"
    )


def _entries(source: Puzzles, knobs: Mapping[str, Any]) -> Iterator[dict[str, Any] | Exception]:
    """Entries without end. An exception stands for a draw that failed, as searches of some tasks do."""
    chunk = 0
    while True:
        _seed_everything(f"{source.seed}/{chunk}")
        # 31 bits: some tasks add the index to the seed and give the sum to numpy, which takes 32 bits.
        dataset = make_dataset(source.task, knobs, seed=derive_seed(source.seed, chunk) % 2**31, size=CHUNK)
        for index in range(CHUNK):
            _seed_everything(f"{source.seed}/{chunk}/{index}")
            try:
                with _deadline(source.task), decimal.localcontext():  # some tasks change the precision of all decimals
                    entry: dict[str, Any] | Exception = dataset[index]
            except BadKeys:
                raise
            except Exception as error:  # a task of another library may raise anything
                entry = error
            yield entry
        chunk += 1


def _seed_everything(text: str) -> None:
    """Seeds the global random numbers, which some tasks read beside their own."""
    import numpy as np
    import sympy.core.random

    random.seed(text)
    np.random.seed(random.getrandbits(32))
    sympy.core.random.seed(random.getrandbits(32))


@contextlib.contextmanager
def _deadline(task: str) -> Iterator[None]:
    def overran(*_: object) -> None:
        raise BadKeys(f"knobs: one problem of {task} took more than {DRAW_LIMIT_S} s to draw; choose easier knobs")

    signal.signal(signal.SIGALRM, overran)
    signal.alarm(DRAW_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)


class PuzzleProcess:
    """Draws problems of reasoning-gym in another process, which starts with the first call of `draw`."""

    @cached_property
    def _pool(self) -> ProcessPool:
        # codeio runs a program to draw a problem, and some of these programs write files.
        self._folder = tempfile.TemporaryDirectory(prefix="puzzles_", ignore_cleanup_errors=True)
        return ProcessPool(1, 0, _prepare, (self._folder.name,), multiprocessing.get_context("spawn"))

    def close(self) -> None:
        if "_pool" in vars(self):
            self._pool.stop()
            self._pool.join()
            self._folder.cleanup()

    def draw(self, source: Puzzles) -> list[Problem]:
        """The problems.

        Raises:
            BadKeys: as `draw_problems`.
            RuntimeError: the process ended.
        """
        hashes = os.environ.get("PYTHONHASHSEED", "random")
        os.environ["PYTHONHASHSEED"] = "0"  # read by the new interpreter
        try:
            return self._pool.schedule(draw_problems, [source]).result()
        except ProcessExpired as error:
            ended = f"the process that draws problems of {source.task} ended with {error.exitcode}"
            raise RuntimeError(ended) from None
        finally:
            os.environ["PYTHONHASHSEED"] = hashes


def _prepare(folder: str) -> None:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some tasks print while they draw
