"""The first Python program in the sandbox: runs the program that a model wrote, for each input.

    python -I inside.py OPTIONS          with OPTIONS as JSON, see `Options`

Each line of stdin is an input, as JSON; each line of stdout is the answer to one input. This file imports nothing but the
standard library, since nothing else is in the sandbox. A program may read everything that this process knows, so this
process never knows what the right answers are.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from typing import Any, NoReturn, TextIO, TypedDict

PROGRAM, SCRATCH = "/program.py", "/tmp"
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
MEGABYTE = 2**20
STDERR_BYTES = 2000  # bytes of stderr that an answer has


class Options(TypedDict):
    """How to run the program, and its limits."""

    function: str | None  # the function to call; None: run the program as a script
    stop_early: bool  # end at the first input where a script fails
    system_calls: str  # the seccomp filter, hexadecimal
    time_s: float  # for one input of a script, or for all calls of a function
    memory_mb: int
    num_processes: int
    files_mb: int
    output_kb: int


class Answer(TypedDict):
    """What a script did with one input."""

    ending: str  # "exit": it ended by itself; "time", "output": it met this limit
    code: int
    stdout: str  # cut off at the limit
    stderr: str  # the last characters


def confine(options: Options) -> None:
    """Puts this process and its future children under the limits of one process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends the program
    limits = {
        resource.RLIMIT_CPU: int(options["time_s"]) + 2,
        resource.RLIMIT_AS: (options["memory_mb"] + 256) * MEGABYTE,  # programs reserve more than they use
        resource.RLIMIT_NPROC: options["num_processes"],
        resource.RLIMIT_FSIZE: max(options["files_mb"] * MEGABYTE, options["output_kb"] * 1024),
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    filter_system_calls(bytes.fromhex(options["system_calls"]))
    os.chdir(SCRATCH)
    sys.argv[:] = ["program.py"]


def filter_system_calls(code: bytes) -> None:
    """Installs a seccomp filter. Its process must not be able to gain privileges, which bubblewrap and setpriv see to."""
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot filter system calls")


def run_script(source: str, inputs: list[str], answers: TextIO, options: Options) -> None:
    """Runs a script for each input, in a process each, and writes an `Answer` for each to ``answers``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # `wait_for` waits for this signal
    for given in inputs:
        files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
        os.pwrite(files[0], given.encode("utf-8", errors="replace"), 0)  # the script reads from the start
        child = os.fork()
        if child == 0:
            become_script(source, files, options)
        answer = wait_for(child, files, options)
        for opened in files:
            os.close(opened)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if options["stop_early"] and (answer["ending"] != "exit" or answer["code"] != 0):
            return


def become_script(source: str, files: list[int], options: Options) -> NoReturn:
    """Runs a script in this process, and ends as the script ends."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    for opened, standard in zip(files, range(3), strict=True):
        os.dup2(opened, standard)
    os.closerange(3, 256)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)
    confine(options)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    sys.exit(0)


def wait_for(child: int, files: list[int], options: Options) -> Answer:
    """Waits for a script to end, and ends it if it takes too long."""
    ending = "exit"
    deadline = time.monotonic() + options["time_s"]
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if (left_s := deadline - time.monotonic()) <= 0:
            ending = "time"
            os.kill(child, signal.SIGKILL)
            found = os.waitpid(child, 0)
            break
        signal.sigtimedwait({signal.SIGCHLD}, left_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # processes that the script left behind
        os.killpg(child, signal.SIGKILL)
    code, most = os.waitstatus_to_exitcode(found[1]), options["output_kb"] * 1024
    size = os.fstat(files[1]).st_size
    if size > most or code == -signal.SIGXFSZ:
        ending = "output"
    stderr_start = max(0, os.fstat(files[2]).st_size - STDERR_BYTES)
    return {
        "ending": ending,
        "code": code,
        "stdout": os.pread(files[1], min(size, most), 0).decode("utf-8", errors="replace"),
        "stderr": os.pread(files[2], STDERR_BYTES, stderr_start).decode("utf-8", errors="replace"),
    }


def run_function(source: str, name: str, inputs: list[Any], answers: TextIO) -> None:
    """Calls a function, or a method of ``Solution``, with each list of arguments.

    Writes ``{"returned": ...}`` or ``{"raised": ...}`` for each to ``answers``. What the program prints goes to stderr.
    """
    module: dict[str, Any] = {"__name__": "program"}
    exec(compile(source, "program.py", "exec"), module)
    is_method = name not in module
    if is_method and not hasattr(module.get("Solution"), name):
        raise NameError(f"the program defines no function {name!r}")
    for arguments in inputs:
        try:
            function = getattr(module["Solution"](), name) if is_method else module[name]
            answer = json.dumps({"returned": function(*arguments)})
        except Exception as error:  # the other calls may still succeed
            answer = json.dumps({"raised": f"{type(error).__name__}: {error}"[:200]})
        answers.write(answer + "\n")
        answers.flush()


def main() -> None:
    options: Options = json.loads(sys.argv[1])
    with open(PROGRAM, encoding="utf-8") as file:
        source = file.read()
    inputs = [json.loads(line) for line in sys.stdin]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if options["function"] is None:
        run_script(source, inputs, answers, options)
    else:
        confine(options)
        run_function(source, options["function"], inputs, answers)


if __name__ == "__main__":
    main()
