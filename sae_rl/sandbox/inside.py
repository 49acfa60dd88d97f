"""The first program in the sandbox: gives up what it may still do, then runs the program that it was started for.

It imports nothing but the standard library, since nothing else is there. Nothing secret reaches it: the program shares its
interpreter, and may read all of it.

    python -I inside.py OPTIONS          with OPTIONS as JSON, see `Options`
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, TypedDict

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on all architectures
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
# By version of Landlock, the newest first: all accesses to files that it knows.
FILE_ACCESSES = ((3, 0x7FFF), (2, 0x3FFF), (1, 0x1FFF))
READ = 0x1 | 0x4 | 0x8  # execute, read files, list folders
FILES_ONLY = 0x1 | 0x2 | 0x4 | 0x4000  # of these accesses, those that a file has too: execute, write, read, truncate
MEGABYTE = 2**20


class Options(TypedDict):
    """What to run, and under which limits."""

    program: str  # path
    function: str | None  # call this function of it with each input, instead of running it as a script
    scratch: str  # folder to start in, the one that it may write to
    readable: list[str]  # with `writable`: all of the file system that it may use; both empty: what there is
    writable: list[str]
    system_calls: str | None  # hexadecimal, the seccomp filter; None: all are allowed
    time_s: float
    memory_mb: int
    num_processes: int
    files_mb: int
    output_kb: int


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
    """Leaves nothing but these of the file system, by Landlock; whether this kernel has it."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return False
    handled = next(accesses for oldest, accesses in FILE_ACCESSES if version >= oldest)
    rules = struct.pack("Q", handled)
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


def run_script(source: str) -> None:
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})


def run_function(source: str, name: str) -> None:
    """Calls it with each line of stdin, a JSON list of arguments; a line ``{"returned": ...}`` or ``{"raised": ...}`` for
    each goes to stdout.

    What the program prints goes to stderr.
    """
    calls = [json.loads(line) for line in sys.stdin]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module: dict[str, Any] = {"__name__": "program"}
    exec(compile(source, "program.py", "exec"), module)
    owner = module if name in module else vars(module["Solution"]) if "Solution" in module else {}
    if name not in owner:
        raise NameError(f"the program defines no function {name!r}")
    for arguments in calls:
        try:
            function = module[name] if owner is module else getattr(module["Solution"](), name)
            answer = json.dumps({"returned": function(*arguments)})
        except Exception as error:  # this call failed, others may not
            answer = json.dumps({"raised": f"{type(error).__name__}: {error}"[:200]})
        answers.write(answer + "\n")
        answers.flush()


def main() -> None:
    options: Options = json.loads(sys.argv[1])
    with open(options["program"], encoding="utf-8") as file:
        source = file.read()
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
    if options["function"] is None:
        run_script(source)
    else:
        run_function(source, options["function"])


if __name__ == "__main__":
    main()
