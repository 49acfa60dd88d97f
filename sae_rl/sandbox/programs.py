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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from sae_rl.sandbox.inside import Options
from sae_rl.sandbox.isolation import INSIDE, PROGRAM, Isolation, user_id
from sae_rl.sandbox.limits import Limits
from sae_rl.sandbox.processes import Ending, descendants, end, within_limits
from sae_rl.sandbox.system_calls import filter_here

SHOWN_BYTES = 2000  # of stderr
KB, MB = 1024, 2**20
# Not in the sandbox: the settings of whoever started the run.
ENVIRONMENT = {
    **{"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, and what it wrote."""

    ending: Ending  # exit: by itself; otherwise the limit that it met
    code: int  # 0: it says that all went well; negative: the signal that ended it
    stdout: str  # cut at the limit
    stderr: str  # its end
    took_s: float


class Sandbox:
    """A folder with the program, for the time of a ``with``.

    Args:
        source: Python.
        limits: of each run.
        isolation: one that works here, see `isolation.chosen`.
        function: name of one of its functions, to call with each line of stdin, a JSON list of arguments; see
            `inside.run_function`. None: it is run as a script.
    """

    def __init__(self, source: str, limits: Limits, isolation: Isolation, function: str | None = None) -> None:
        self._source, self._limits, self._isolation, self._function = source, limits, isolation, function

    def __enter__(self) -> Self:
        self._held = tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=True)
        self._folder = Path(self._held.name)
        self._folder.chmod(0o755)
        program = self._folder / PROGRAM
        program.write_text(self._source, encoding="utf-8", errors="replace")
        program.chmod(0o644)
        shutil.copyfile(INSIDE, self._folder / INSIDE.name)  # where whoever runs it may read it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.cleanup()

    def run(self, stdin: str, time_s: float | None = None) -> Ended:
        """Runs the program to its end, or to a limit; ``time_s`` is one of this run alone."""
        time_s = self._limits.time_s if time_s is None else time_s
        with contextlib.ExitStack() as stack:
            given, written, said = (stack.enter_context(tempfile.TemporaryFile(dir=self._folder)) for _ in range(3))
            given.write(stdin.encode("utf-8", errors="replace"))
            given.seek(0)
            scratch = stack.enter_context(self._scratch())
            others = set(descendants(os.getpid())) if self._isolation.how == "limits" else None
            started = time.monotonic()
            process = subprocess.Popen(
                self._command(scratch),
                stdin=given,
                stdout=written,
                stderr=said,
                env={**ENVIRONMENT, "HOME": scratch, "TMPDIR": scratch},
                cwd=self._folder,
                start_new_session=True,
            )
            try:
                ending = within_limits(process, started + time_s, self._limits.memory_mb * MB)
            finally:
                end(process, others)
            most = self._limits.output_kb * KB
            if os.fstat(written.fileno()).st_size > most or process.returncode in (
                -signal.SIGXFSZ,
                128 + signal.SIGXFSZ,
            ):
                ending = "output"
            return Ended(
                ending,
                process.returncode,
                read_from(written, 0, most),
                read_from(said, max(0, os.fstat(said.fileno()).st_size - SHOWN_BYTES), SHOWN_BYTES),
                time.monotonic() - started,
            )

    def _command(self, scratch: str) -> list[str]:
        isolation, code = self._isolation, filter_here()
        options = Options(
            program=isolation.path(self._folder, PROGRAM),
            function=self._function,
            scratch=scratch,
            readable=isolation.readable(self._folder),
            writable=isolation.writable(scratch),
            system_calls=None if code is None else code.hex(),
            time_s=self._limits.time_s,
            memory_mb=self._limits.memory_mb,
            num_processes=self._limits.num_processes,
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
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as scratch:
            if self._isolation.as_root:
                os.chown(scratch, user_id(), user_id())
            yield scratch


def read_from(file: IO[bytes], start: int, most: int) -> str:
    file.seek(start)
    return file.read(most).decode("utf-8", errors="replace")
