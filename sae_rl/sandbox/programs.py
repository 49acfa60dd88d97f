"""One program in the sandbox, run as often as there are inputs for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from sae_rl.sandbox.folders import temporary_folder
from sae_rl.sandbox.inside import Options
from sae_rl.sandbox.isolation import INSIDE, PROGRAM, Isolation, open_folder, user_id
from sae_rl.sandbox.limits import Limits
from sae_rl.sandbox.processes import Ending, ResourceLimits, descendants, end, num_threads_of_user, within_limits
from sae_rl.sandbox.system_calls import filter_here

SHOWN_BYTES = 2000  # of stderr
KB, MB = 1024, 2**20
REMOVE_S = 2.0  # for its folder; what stays then goes with the folder that holds all temporary files of a run
SPARE_THREADS = 256  # of others of the user, who start some meanwhile
ESCAPED = 6  # bytes that JSON may need for one
# Not in the sandbox: the settings of whoever started the run.
ENVIRONMENT = {
    **{"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended, and what it answered."""

    ending: Ending  # exit: by itself; otherwise the limit that all inputs together met
    code: int  # 0: all went well; negative: the signal that ended it
    answers: list[Any]  # JSON, one for each input that it came to; whatever the program made of them
    stderr: str  # its end


class Sandbox:
    """A folder with the program, for the time of a ``with``.

    With limits alone, processes that a program leaves behind are found if `adopt_orphans` was called in this process.

    Args:
        source: Python.
        limits: of each input; memory, processes and files of all together.
        isolation: one that works here, see `isolation.chosen`.
        function: name of one of its functions, to call with each input, a list of arguments. None: it is run as a script,
            a process for each input, which is its stdin.
    """

    def __init__(self, source: str, limits: Limits, isolation: Isolation, function: str | None = None) -> None:
        self._source, self._limits, self._isolation, self._function = source, limits, isolation, function

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder = Path(stack.enter_context(temporary_folder("sandbox_", open_folder(), REMOVE_S)))
            self._folder.chmod(0o755)
            program = self._folder / PROGRAM
            program.write_text(self._source, encoding="utf-8", errors="replace")
            program.chmod(0o644)
            shutil.copyfile(INSIDE, self._folder / INSIDE.name)  # where whoever runs it may read it
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def run(self, inputs: Sequence[Any], total_s: float, stop_early: bool = False) -> Ended:
        """Runs the program with all inputs, to its end or to a limit.

        A script's answers have the form of `inside.Answer`, a function's are ``{"returned": ...}`` or ``{"raised": ...}``;
        but a program may write what it likes.

        Args:
            total_s: for all inputs together.
            stop_early: at the first input where a script fails.
        """
        with contextlib.ExitStack() as stack:
            given, written, said = (stack.enter_context(tempfile.TemporaryFile(dir=self._folder)) for _ in range(3))
            given.write("".join(json.dumps(each) + "\n" for each in inputs).encode())
            given.seek(0)
            scratch = stack.enter_context(self._scratch())
            others = set(descendants(os.getpid())) if self._isolation.how == "limits" else None
            deadline = time.monotonic() + total_s
            process = subprocess.Popen(
                self._command(scratch, total_s, stop_early),
                stdin=given,
                stdout=written,
                stderr=said,
                env={**ENVIRONMENT, "HOME": scratch, "TMPDIR": scratch},
                cwd=self._folder,
                start_new_session=True,
            )
            try:
                ending = within_limits(process, deadline, self._most(scratch))
            finally:
                end(process, others)
            most = len(inputs) * (self._limits.output_kb * KB * ESCAPED + SHOWN_BYTES * ESCAPED + KB)
            stderr_size = os.fstat(said.fileno()).st_size
            answers = read_answers(read_from(written, 0, most))
            if ending != "exit" and answers and was_killed(answers[-1]):
                answers.pop()  # the limit killed it
            return Ended(
                ending,
                process.returncode,
                answers,
                read_from(said, max(0, stderr_size - SHOWN_BYTES), SHOWN_BYTES),
            )

    def _most(self, scratch: str) -> ResourceLimits:
        """What has to be watched; where the kernel has no limit for it."""
        limits = self._limits
        if self._isolation.how != "limits":
            return ResourceLimits(limits.memory_mb * MB)
        num_threads = None if self._isolation.as_root else limits.num_processes + 1  # inside.py starts the program
        return ResourceLimits(limits.memory_mb * MB, num_threads, (scratch, limits.files_mb * MB, limits.num_files))

    def _num_processes(self) -> int:
        """As the kernel counts them, all of a user: with limits alone, and no root, also those beside the program."""
        if self._isolation.how != "limits" or self._isolation.as_root:
            return self._limits.num_processes
        return num_threads_of_user() + self._limits.num_processes + SPARE_THREADS

    def _command(self, scratch: str, total_s: float, stop_early: bool) -> list[str]:
        isolation, code = self._isolation, filter_here()
        options = Options(
            program=isolation.path(self._folder, PROGRAM),
            function=self._function,
            stop_early=stop_early,
            scratch=scratch,
            readable=isolation.readable(self._folder),
            writable=isolation.writable(scratch),
            system_calls=None if code is None else code.hex(),
            time_s=self._limits.time_s if self._function is None else total_s,
            memory_mb=self._limits.memory_mb,
            num_processes=self._num_processes(),
            files_mb=self._limits.files_mb,
            output_kb=self._limits.output_kb,
        )
        return isolation.command(self._folder, [json.dumps(options)], self._limits)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[str]:
        """The folder that it may write to, as it knows it."""
        if self._isolation.how != "limits":
            yield "/tmp"  # of its own file system
            return
        with temporary_folder("scratch_", str(self._folder), REMOVE_S) as scratch:
            if self._isolation.as_root:
                os.chown(scratch, user_id(), user_id())
            yield scratch


def was_killed(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.get("ending") == "exit" and answer.get("code") == -signal.SIGKILL


def read_from(file: IO[bytes], start: int, most: int) -> str:
    file.seek(start)
    return file.read(most).decode("utf-8", errors="replace")


def read_answers(text: str) -> list[Any]:
    """As far as they can be read."""
    answers = []
    for line in text.splitlines():
        try:
            answers.append(json.loads(line))
        except (ValueError, RecursionError):  # cut off, too deep, or a number of more digits than Python reads
            answers.append(None)
    return answers
