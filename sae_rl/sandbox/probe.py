"""Finds out how this machine can isolate programs, by running one."""

from __future__ import annotations

import shutil
import subprocess
from typing import get_args

from sae_rl.sandbox.isolation import Isolation, Limits
from sae_rl.sandbox.programs import run_program

PROBE_S = 10.0
CHOSEN: list[Isolation] = []  # what `chosen` returned in this process, or in the one that it checks for
REMEDY = (
    "Install bubblewrap. Where user namespaces are forbidden, as in Docker's and Kubernetes' default containers, allow them "
    "or check programs on another machine, with the verifier http: docs/sandbox.md says how"
)


def chosen() -> Isolation:
    """The isolation that works on this machine: bubblewrap, or else unshare. Raises OSError if neither works.

    It is tried once for each process.
    """
    problems = []
    for isolation in get_args(Isolation):
        if CHOSEN:
            break
        if (problem := problem_with(isolation)) is None:
            CHOSEN.append(isolation)
        problems.append(f"{isolation}: {problem}")
    if not CHOSEN:
        raise OSError(f"programs cannot be isolated on this machine ({'; '.join(problems)}). {REMEDY}")
    return CHOSEN[0]


def problem_with(isolation: Isolation) -> str | None:
    """Why a program cannot be run with this isolation; None if one was."""
    tool = "bwrap" if isolation == "bubblewrap" else "unshare"
    if shutil.which(tool) is None:
        return f"{tool} is not installed"
    try:
        ended = run_program("print(6 * 7)", [""], limits=Limits(time_s=PROBE_S), isolation=isolation, total_s=PROBE_S)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if [answer["stdout"] for answer in ended.answers] == ["42\n"]:
        return None
    return (ended.stderr.strip().splitlines() or [ended.ending])[-1]
