"""One check, as the processes of the reward pool run it. Imports little: such a process may start in the middle of a step."""

from __future__ import annotations

import math
import resource
import tempfile

from sae_rl.rewards.verdict import Sample, Verdict, Verifier
from sae_rl.sandbox.processes import adopt_orphans


def start(folder: str, num_bytes: int) -> None:
    """Prepares a process that checks.

    Args:
        folder: for its temporary files; whoever started the process removes it.
        num_bytes: it may allocate; beyond that, Python raises MemoryError.
    """
    tempfile.tempdir = folder
    adopt_orphans()
    # Not RLIMIT_AS: libraries reserve address space that they never use.
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def check(verifier: Verifier, sample: Sample) -> Verdict:
    """The verdict.

    Raises:
        ValueError: it is none, or its score is not finite.
    """
    verdict = verifier(sample)
    if not isinstance(verdict, Verdict):
        raise ValueError(f"returned {verdict!r} instead of a Verdict")
    if not math.isfinite(verdict.score):
        raise ValueError(f"returned the score {verdict.score}")
    return verdict
