"""Runs one program in the sandbox, for as many inputs as there are."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from sae_rl.sandbox.inside import PROGRAM, SCRATCH, STDERR_BYTES, Options
from sae_rl.sandbox.isolation import INSIDE, Isolation, Limits, command
from sae_rl.sandbox.system_calls import system_call_filter

KB, MB = 1024, 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
FIRST_LOOK_S, LOOK_S = 0.25, 0.05  # when memory is measured: most programs have ended before the first time
KILL_S = 1.0  # a sandbox whose first process was killed ends within this time
ESCAPED = 6  # bytes of JSON for one byte of output, at most
ENVIRONMENT = {  # all of it: nothing of the run's own environment is in the sandbox
    **{"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
    **{"HOME": SCRATCH, "TMPDIR": SCRATCH},
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
Ending = Literal["exit", "time", "memory"]  # by itself, or by the limit that all inputs together met


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended, and what it answered."""

    ending: Ending
    code: int  # the exit code; negative: the signal that ended the sandbox
    answers: list[Any]  # one for each input that the program came to; hostile programs may write what they like here
    stderr: str  # the last characters


def run_program(
    source: str,
    inputs: Sequence[Any],
    *,
    function: str | None = None,
    limits: Limits,
    isolation: Isolation,
    total_s: float,
    stop_early: bool = False,
) -> Ended:
    """Runs a Python program with all inputs, to its end or to a limit. Raises OSError if the sandbox cannot be started.

    Args:
        inputs: texts for stdin of a script, which runs in a process for each; or lists of arguments of ``function``. The
            answers have the form of `inside.Answer`, or ``{"returned": ...}`` and ``{"raised": ...}`` of a function.
        total_s: the time for all inputs together.
        stop_early: end at the first input where a script fails.
    """
    options = Options(
        function=function,
        stop_early=stop_early,
        system_calls=system_call_filter().hex(),
        time_s=limits.time_s if function is None else total_s,
        memory_mb=limits.memory_mb,
        num_processes=limits.num_processes,
        files_mb=limits.files_mb,
        output_kb=limits.output_kb,
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox_")))
        write_files(folder, source)
        stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(3))
        stdin.write("".join(json.dumps(each) + "\n" for each in inputs).encode())
        stdin.seek(0)
        deadline = time.monotonic() + total_s
        run = command(isolation, folder, [json.dumps(options)], limits)
        process = subprocess.Popen(
            run, stdin=stdin, stdout=stdout, stderr=stderr, env=ENVIRONMENT, cwd=folder, start_new_session=True
        )
        try:
            ending = wait_within_limits(process, deadline, limits.memory_mb * MB)
        finally:
            end(process)
        most = len(inputs) * (limits.output_kb * KB * ESCAPED + STDERR_BYTES * ESCAPED + KB)
        answers = read_answers(read_text(stdout, 0, most))
        if ending != "exit" and answers and was_killed(answers[-1]):
            answers.pop()  # the limit killed it
        stderr_start = max(0, os.fstat(stderr.fileno()).st_size - STDERR_BYTES)
        return Ended(ending, process.returncode, answers, read_text(stderr, stderr_start, STDERR_BYTES))


def write_files(folder: Path, source: str) -> None:
    """Writes the program and inside.py, readable for the user that they run as."""
    for name, text in ((PROGRAM[1:], source), (INSIDE.name, INSIDE.read_text())):
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
        (folder / name).chmod(0o644)


def wait_within_limits(process: subprocess.Popen[bytes], deadline: float, memory_bytes: int) -> Ending:
    """Waits until a process ends, or meets the deadline, or uses too much memory together with its descendants."""
    look_s = FIRST_LOOK_S
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            process.wait(min(look_s, left_s))
            return "exit"
        except subprocess.TimeoutExpired:
            look_s = LOOK_S
        if sum(map(resident_bytes, [process.pid, *descendants(process.pid)])) > memory_bytes:
            return "memory"
    return "time"


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a sandbox. The kernel kills all processes of its namespace before its first process is gone."""
    for pid in children(process.pid):  # the first process of the namespace: its parent waits for it, so no zombie stays
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_S)
    process.kill()
    process.wait()


def descendants(pid: int) -> Iterator[int]:
    """Children of a process, their children, and so on."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def children(pid: int) -> set[int]:
    """Children of a process; none if it has ended."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return {int(child) for thread in threads for child in (thread / "children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def was_killed(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.get("ending") == "exit" and answer.get("code") == -signal.SIGKILL


def read_text(file: IO[bytes], start: int, most: int) -> str:
    file.seek(start)
    return file.read(most).decode("utf-8", errors="replace")


def read_answers(text: str) -> list[Any]:
    """One value for each line; None for a line that is not JSON."""
    answers = []
    for line in text.splitlines():
        try:
            answers.append(json.loads(line))
        except (ValueError, RecursionError):  # cut off, nested too deeply, or a number of too many digits for Python
            answers.append(None)
    return answers
