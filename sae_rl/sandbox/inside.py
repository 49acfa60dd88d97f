"""The first program in the sandbox: gives up what it may still do, then runs the program that it was started for.

It imports nothing but the standard library, since nothing else is there. Nothing secret reaches it: the program shares its
interpreter, and may read all of it.

    python -I inside.py OPTIONS          with OPTIONS as JSON, see `Options`

Each line of stdin is JSON, an input; each line of stdout what came of it.
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

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on all architectures
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
# By version of Landlock, the newest first: all accesses to files that it knows.
FILE_ACCESSES = ((3, 0x7FFF), (2, 0x3FFF), (1, 0x1FFF))
SCOPED_SINCE = 6  # version that can also keep signals and abstract sockets within
SCOPES = 0x1 | 0x2
READ = 0x1 | 0x4 | 0x8  # execute, read files, list folders
FILES_ONLY = 0x1 | 0x2 | 0x4 | 0x4000  # of these accesses, those that a file has too: execute, write, read, truncate
MEGABYTE = 2**20


class Options(TypedDict):
    """What to run, and under which limits."""

    program: str  # path
    function: str | None  # call this function of it, instead of running it as a script
    stop_early: bool  # at the first input where a script fails
    scratch: str  # folder to start in, the one that it may write to
    readable: list[str]  # with `writable`: all of the file system that it may use; both empty: what there is
    writable: list[str]
    system_calls: str | None  # hexadecimal, the seccomp filter; None: all are allowed
    time_s: float  # of one input of a script, or of all calls of a function
    memory_mb: int
    num_processes: int
    files_mb: int
    output_kb: int


class Answer(TypedDict):
    """What a script did with one input."""

    ending: str  # exit, time, output: by itself, or the limit that it met
    code: int
    stdout: str  # cut at the limit
    stderr: str  # its end


def limit(options: Options) -> None:
    """Limits of each process; whoever started this one watches over all together."""
    limits = {
        resource.RLIMIT_CPU: int(options["time_s"]) + 2,  # should nobody be left to kill it
        resource.RLIMIT_AS: (options["memory_mb"] + 256) * MEGABYTE,  # address space is more than memory
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


def checked(returned: int, what: str) -> int:
    if returned < 0:
        raise OSError(ctypes.get_errno(), f"cannot {what}")
    return returned


def restrict_files(libc: Any, readable: list[str], writable: list[str]) -> bool:
    """Leaves nothing but these of the file system, and signals to nobody else, by Landlock; whether this kernel has it."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return False
    handled = next(accesses for oldest, accesses in FILE_ACCESSES if version >= oldest)
    rules = struct.pack("QQQ", handled, 0, SCOPES) if version >= SCOPED_SINCE else struct.pack("Q", handled)
    ruleset = checked(libc.syscall(LANDLOCK_CREATE_RULESET, rules, len(rules), 0), "create Landlock rules")
    for path, accesses in [(path, READ) for path in readable] + [(path, handled) for path in writable]:
        opened = os.open(path, os.O_PATH)
        allowed = accesses & handled if os.path.isdir(path) else accesses & handled & FILES_ONLY
        rule = struct.pack("=Qi", allowed, opened)
        checked(libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_PATH_BENEATH, rule, 0), f"allow {path}")
        os.close(opened)
    checked(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "restrict files")
    os.close(ruleset)
    return True


def filter_system_calls(libc: Any, code: bytes) -> None:
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "filter system calls")


def confine(options: Options) -> None:
    """From here on this process, and what comes of it, can do no more than the program may."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends the program
    limit(options)
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "give up privileges")
    if options["readable"]:
        restrict_files(libc, options["readable"], options["writable"])
    if options["system_calls"] is not None:
        filter_system_calls(libc, bytes.fromhex(options["system_calls"]))
    os.chdir(options["scratch"])
    sys.argv[:] = ["program.py"]


def run_script(source: str, inputs: list[str], answers: TextIO, options: Options) -> None:
    """Runs it for each input, in a process each; an `Answer` for each goes to ``answers``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # they are waited for
    for given in inputs:
        files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
        with os.fdopen(os.dup(files[0]), "wb") as file:
            file.write(given.encode("utf-8", errors="replace"))
        os.lseek(files[0], 0, os.SEEK_SET)
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
    """Ends as the program ends."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    for opened, usual in zip(files, range(3), strict=True):
        os.dup2(opened, usual)
    os.closerange(3, 256)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)
    confine(options)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    sys.exit(0)


def wait_for(child: int, files: list[int], options: Options) -> Answer:
    ending = "exit"
    deadline = time.monotonic() + options["time_s"]
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if (left_s := deadline - time.monotonic()) <= 0:
            ending = "time"
            os.kill(child, signal.SIGKILL)
            found = os.waitpid(child, 0)
            break
        signal.sigtimedwait({signal.SIGCHLD}, left_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # those that it left behind
        os.killpg(child, signal.SIGKILL)
    code, most = os.waitstatus_to_exitcode(found[1]), options["output_kb"] * 1024
    size = os.fstat(files[1]).st_size
    if size > most or code == -signal.SIGXFSZ:
        ending = "output"
    stderr_size = os.fstat(files[2]).st_size
    return {
        "ending": ending,
        "code": code,
        "stdout": os.pread(files[1], min(size, most), 0).decode("utf-8", errors="replace"),
        "stderr": os.pread(files[2], 2000, max(0, stderr_size - 2000)).decode("utf-8", errors="replace"),
    }


def run_function(source: str, name: str, inputs: list[Any], answers: TextIO) -> None:
    """Calls it with each list of arguments; ``{"returned": ...}`` or ``{"raised": ...}`` for each goes to ``answers``.

    What the program prints goes to stderr.
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
        except Exception as error:  # this call failed, others may not
            answer = json.dumps({"raised": f"{type(error).__name__}: {error}"[:200]})
        answers.write(answer + "\n")
        answers.flush()


def main() -> None:
    options: Options = json.loads(sys.argv[1])
    with open(options["program"], encoding="utf-8") as file:
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
