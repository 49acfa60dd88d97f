"""Programs that take turns, so that what the machine does beside them meets all of them alike."""

from __future__ import annotations

import contextlib
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil


def take_turns(
    programs: Mapping[str, Callable[[], object]], rounds: int, slow_s: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of every run that counts: not the first, which compiles and warms up.

    A program that takes longer than ``slow_s`` runs once, and that run counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            if turn and seconds[name] and seconds[name][0] > slow_s:
                continue
            started = time.perf_counter()
            program()
            elapsed = time.perf_counter() - started
            if turn or elapsed > slow_s:
                seconds[name].append(elapsed)
    return seconds


@contextlib.contextmanager
def in_a_process(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[Callable[[], None]]:
    """A program that works in a process of its own each time that it is called, and ends with this one.

    The process works when a line comes in, and prints "done" when it is.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(env)
        )

    def work() -> None:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        for line in process.stdout:
            if line.strip() == "done":
                return
        raise RuntimeError(f"{' '.join(command[:3])} ended: {log.read_text()[-2000:]}")

    try:
        yield work
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()  # not killed: it may have children to end
            psutil.wait_procs([psutil.Process(process.pid), *family], timeout=20)
            for left in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.kill()
        process.communicate()  # they all held its output
