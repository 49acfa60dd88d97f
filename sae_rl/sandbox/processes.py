"""Watches over the processes of one run, and ends them all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_rl.sandbox.folders import holds_more

Ending = Literal["exit", "time", "memory", "processes", "files"]  # by itself, or by the limit that it met
PR_SET_CHILD_SUBREAPER = 36
PAGE = os.sysconf("SC_PAGE_SIZE")
SLOW_S = 0.25  # a run that takes longer is looked at
POLL_S = 0.05
KILL_S = 2.0  # for killed processes to be gone


def adopt_orphans() -> None:
    """Processes whose parent ends become this process's children, where they are found and ended."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> Iterator[int]:
    """Children, their children, and so on."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = {int(child) for thread in threads for child in (thread / "children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended
        return
    for child in children:
        yield child
        yield from descendants(child)


def resident_bytes(pid: int) -> int:
    """Of one process; 0: it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def num_threads(pid: int) -> int:
    """Of one process; 0: it has ended."""
    try:
        return int(_status(pid)[17])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def num_threads_of_user() -> int:
    """Of all processes of the user who runs this one."""
    found, user = 0, os.getuid()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if folder.name.isdigit() and folder.stat().st_uid == user:
                found += num_threads(int(folder.name))
    return found


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """What a process and its descendants may use together."""

    memory_bytes: int
    num_threads: int | None = None  # None: the kernel counts them
    files: tuple[str, int, int] | None = (
        None  # a folder, and how many bytes and files in it; None: it is full by itself
    )

    def met(self, pid: int) -> Ending | None:
        """The limit that they are beyond."""
        pids = [pid, *descendants(pid)]
        if sum(map(resident_bytes, pids)) > self.memory_bytes:
            return "memory"
        if self.num_threads is not None and sum(map(num_threads, pids)) > self.num_threads:
            return "processes"
        return "files" if self.files is not None and holds_more(*self.files) else None


def within_limits(process: subprocess.Popen[bytes], deadline: float, most: ResourceLimits) -> Ending:
    """Waits for the end of a process, or for it and its descendants to meet a limit."""
    pause_s = SLOW_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            process.wait(min(pause_s, left))
            return "exit"
        except subprocess.TimeoutExpired:
            pause_s = POLL_S
        if (met := most.met(process.pid)) is not None:
            return met
    return "time"


def end(process: subprocess.Popen[bytes], others: set[int] | None) -> None:
    """Kills a process and whatever came of it.

    Args:
        others: descendants of this process that stay; all that are not among them end, which finds orphans that
            `adopt_orphans` brought here. None: its own descendants are all there is.
    """
    limit = time.monotonic() + KILL_S
    below = set(descendants(process.pid))
    if below:  # the first of its namespaces dies, with all in them, and is waited for by its parent
        _kill(below)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_S / 2)
    process.kill()
    process.wait()
    num_empty = 0  # looks in a row that found nothing: a process that changes its parent meanwhile escapes one
    while time.monotonic() < limit and num_empty < 2:
        if others is not None:
            below |= set(descendants(os.getpid())) - others
        _kill(below)
        _reap(below)
        below = {pid for pid in below if _is_alive(pid)}
        num_empty = 0 if below else num_empty + 1 if others is not None else 2
        if below:
            time.sleep(0.002)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _reap(pids: set[int]) -> None:
    """Those that this process adopted."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


def _status(pid: int) -> list[str]:
    """What /proc says behind its name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def _is_alive(pid: int) -> bool:
    try:
        return _status(pid)[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
