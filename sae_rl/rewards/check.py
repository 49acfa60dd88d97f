"""One check, as the processes of the reward pool run it. Imports little: such a process may start in the middle of a step."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import resource
import tempfile
from collections.abc import Iterable

from sae_rl.rewards.verdict import Failed, Sample, Verdict, Verifier
from sae_rl.sandbox.isolation import CHOSEN, Asked, Isolation
from sae_rl.sandbox.processes import adopt_orphans

OUT_OF_MEMORY = (
    errno.ENOMEM
)  # the exit code that says so; a library whose system call fails for want of memory ends so too
MAX_SHOWN = 1000  # characters of an error


def start(folder: str, num_bytes: int, verifiers: Iterable[bytes]) -> None:
    """Prepares a process that checks.

    Args:
        folder: for its temporary files; whoever started the process removes it.
        num_bytes: it may allocate; beyond that, Python raises MemoryError.
        verifiers: pickled; what they import is imported now, before a check has a deadline.
    """
    tempfile.tempdir = folder
    adopt_orphans()
    # Not RLIMIT_AS: libraries reserve address space that they never use.
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    for each in verifiers:
        with contextlib.suppress(Exception):  # the user's code; its checks say so
            pickle.loads(each)


def check(asked: bytes, sample: Sample) -> Verdict | Failed:
    """The verdict, or why there is none.

    Nothing but our own types and plain text leaves this process, and no exception: those of others may not be rebuilt where
    they are read. A process that has run out of memory ends, since what filled it may stay.

    Args:
        asked: pickled, the verifier and how the programs that it may run are isolated.
    """
    try:
        return judged(asked, sample)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def judged(asked: bytes, sample: Sample) -> Verdict | Failed:
    try:
        found: tuple[Verifier, dict[Asked, Isolation]] = pickle.loads(asked)
        CHOSEN.update(found[1])
        return checked(found[0](sample))
    except MemoryError:
        raise
    except BaseException as error:  # a verifier is the user's code: whatever it raises is a failed check
        return Failed(reason(error))


def checked(verdict: object) -> Verdict:
    """A copy of it.

    Raises:
        ValueError: it is none, its score is not finite, or what it says is no text.
    """
    if not isinstance(verdict, Verdict):
        raise ValueError(f"returned {verdict!r} instead of a Verdict")
    if not math.isfinite(verdict.score):
        raise ValueError(f"returned the score {verdict.score}")
    for name, said in (("why", verdict.why), ("answer", verdict.answer)):
        if not isinstance(said, str) and (name == "why" or said is not None):
            raise ValueError(f"returned a Verdict with {name} = {said!r}, which is not text")
    return Verdict(float(verdict.score), plain(verdict.why), None if verdict.answer is None else plain(verdict.answer))


def reason(error: BaseException) -> str:
    """Its type and its message."""
    try:
        message = plain(str(error))
    except Exception as another:  # its __str__ is the user's code too
        message = f"(its message cannot be read: {type(another).__name__})"
    return f"{type(error).__name__}: {message}"[:MAX_SHOWN]


def plain(text: str) -> str:
    """It as every file takes it: no subclass, no half of a character."""
    return text.encode("utf-8", errors="replace").decode()
