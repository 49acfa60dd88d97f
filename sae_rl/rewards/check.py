"""One check, in a process of the reward pool. Imports little, since such a process may start in the middle of a step."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import resource
import tempfile
from collections.abc import Iterable

from sae_rl.plugins import PlugInError, named
from sae_rl.rewards.verdict import Failed, Sample, Verdict, Verifier
from sae_rl.sandbox.isolation import Isolation
from sae_rl.sandbox.probe import CHOSEN

OUT_OF_MEMORY = errno.ENOMEM  # exit code; libraries that fail to allocate memory exit with it too
MAX_SHOWN = 1000  # characters of an error


def start(folder: str, num_bytes: int, verifiers: Iterable[bytes]) -> None:
    """Prepares a process for checks.

    Args:
        folder: for its temporary files, which whoever started it removes.
        num_bytes: memory that it may allocate. Beyond that, Python raises MemoryError.
        verifiers: pickled. Their modules are imported now, before a check has a deadline.
    """
    tempfile.tempdir = folder
    # RLIMIT_AS would be too strict: libraries reserve address space that they never use.
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    for each in verifiers:
        with contextlib.suppress(Exception):  # a user's code; its checks will report the error
            pickle.loads(each)


def check(question: bytes, sample: Sample) -> Verdict | Failed:
    """Runs one check.

    Returns:
        The verdict, or why there is none. Both hold plain text, since the driver might be unable to unpickle objects of a
        user's classes.

    Args:
        question: the pickled verifier and, if it runs programs, the isolation that the driver chose.
    """
    verifier: Verifier
    isolation: Isolation | None
    try:
        verifier, isolation = pickle.loads(question)
        if isolation is not None:
            CHOSEN[:] = [isolation]
        with named(verifier):
            return checked(verifier(sample))
    except MemoryError:  # objects that fill this process may stay, so it ends and another one starts
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # whatever a user's verifier raises, SystemExit included, is a failed check
        return Failed(reason(error))


def checked(verdict: object) -> Verdict:
    """A copy of a verdict, without subclasses of text. Raises ValueError for anything but a `Verdict` with a finite score."""
    if not isinstance(verdict, Verdict):
        raise ValueError(f"returned {verdict!r} instead of a Verdict")
    if not math.isfinite(verdict.score):
        raise ValueError(f"returned the score {verdict.score}")
    for name, said in (("why", verdict.why), ("answer", verdict.answer)):
        if not isinstance(said, str) and (name == "why" or said is not None):
            raise ValueError(f"returned a Verdict with {name} = {said!r}, which is not text")
    return Verdict(float(verdict.score), plain(verdict.why), None if verdict.answer is None else plain(verdict.answer))


def reason(error: BaseException) -> str:
    """The type and the message of an exception; of a user's exception its place, too."""
    try:
        message = plain(str(error))
    except Exception as another:  # a user's __str__ may raise
        message = f"(its message cannot be read: {type(another).__name__})"
    return (message if isinstance(error, PlugInError) else f"{type(error).__name__}: {message}")[:MAX_SHOWN]


def plain(text: str) -> str:
    """The same text as a plain `str` that UTF-8 can encode."""
    return text.encode("utf-8", errors="replace").decode()
