"""Honest programs: what counts as right, and what is said about those that are not."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from sae_rl.rewards.code import Code, different, program_of, read_tests, same_value
from sae_rl.rewards.table import check_verifier
from sae_rl.rewards.verdict import Sample, Verdict
from sae_rl.rewards.weighted import Weighted
from sae_rl.sandbox.isolation import Isolation
from sae_rl.sandbox.probe import problem_with
from sae_rl.sandbox.system_calls import (
    ALLOW,
    CLONE,
    CLONE3,
    EQUAL,
    LOAD,
    MACHINES,
    REFUSED,
    RETURN,
    SOCKETPAIR,
    assembled,
)

from .test_pool import make_pool, rollout, score

ADD = {"inputs": ["1 2\n", "3 4\n", "5 6\n"], "outputs": ["3\n", "7\n", "11\n"]}
FIRST = {"fn_name": "first", "inputs": [[[3, 1]], [[5]], [[]]], "outputs": [3, 5, None]}


def check(program: str, tests: dict[str, Any], **knobs: Any) -> Verdict:
    response = f"Thinking.\n```python\n{program}\n```\nDone."
    return Code(**knobs)(Sample(prompt="", response=response, answer=json.dumps(tests)))


def test_scripts() -> None:
    assert check("print(sum(map(int, input().split())))", ADD) == Verdict(1.0, "all 3 tests pass")
    verdict = check("a, b = map(int, input().split())\nprint(a + b if a < 3 else 0)", ADD)
    assert verdict == Verdict(0.0, "1 of 3 tests pass; test 2: line 1: expected '7', found '0'")
    assert check("a, b = map(int, input().split())\nprint(a + b if a < 4 else 0)", ADD, partial=True).score == 2 / 3


def test_functions() -> None:
    assert check("def first(x): return x[0] if x else None", FIRST).score == 1.0
    assert check("class Solution:\n    def first(self, x): return x[0] if x else None", FIRST).score == 1.0
    assert check("print('noise')\ndef first(x):\n    print(x)\n    return x[0] if x else None", FIRST).score == 1.0
    inherited = "class Base:\n    def first(self, x): return x[0] if x else None\nclass Solution(Base): pass"
    assert check(inherited, FIRST).score == 1.0
    verdict = check("def first(x): return x[0]", FIRST, partial=True)
    assert verdict == Verdict(2 / 3, "2 of 3 tests pass; test 3: it raised 'IndexError: list index out of range'")
    assert "defines no function 'first'" in check("def last(x): return x[-1]", FIRST).why
    usual = "import math, collections, re\nfrom typing import *\n"
    assert check(f"{usual}def first(x: List[int]): return x[0] if x else None", FIRST).score == 1.0


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print(", "SyntaxError"),
        ("raise KeyError('x')", "exit code 1: \"KeyError: 'x'\""),
        ("while True: pass", "it ran longer than 1 s"),
        ("print(3)\nraise SystemExit(3)", "exit code 3: nothing on stderr"),
        ("print('1' * 5000)", "line 1: expected '3', found '1111"),
        ("print(3)\nprint(4)", "expected 1 lines, found 2"),
        ("", "expected 1 lines, found 0"),
        ("x = bytearray(1 << 32)", "MemoryError"),
        ("while True: print('1' * 1000)", "it wrote more than 1024 KB"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_why_a_program_is_wrong(program: str, why: str) -> None:
    verdict = check(program, ADD, time_s=1.0)
    assert verdict.score == 0.0
    assert verdict.why.startswith("0 of 3 tests pass; test 1: ") and why in verdict.why


def test_all_tests_share_a_time_limit() -> None:
    slow = "import time\ntime.sleep(0.4)\nprint(sum(map(int, input().split())))"
    tests = {"inputs": ["1 2\n"] * 9, "outputs": ["3\n"] * 9}
    verdict = check(slow, tests, time_s=1.0, total_s=1.0, partial=True)
    assert 0 < verdict.score < 0.5
    slow = "def f(x):\n    import time\n    time.sleep(0.4)\n    return x"
    tests = {"fn_name": "f", "inputs": [[1]] * 9, "outputs": [1] * 9}
    assert check(slow, tests, time_s=1.0, total_s=1.0).score == 0.0


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1 2\n3 \n\n", "1 2\n3", True),
        ("1  2", "1 2", True),
        ("1 2", "12", False),
        ("0.3000000001", "0.3", True),
        ("0.31", "0.3", False),
        ("3.0", "3", False),  # a whole number is expected
        ("x 1e0", "x 1.0", True),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("yes", "YES", False),
        ("", "", True),
        ("a\n\nb", "a\nb", False),
    ],
)
def test_outputs_are_compared(found: str, expected: str, same: bool) -> None:
    assert (different(found, expected, 1e-6) is None) == same


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (1, 1, True),
        (1, 1.0, True),
        (1.0000001, 1, True),
        (1.1, 1, False),
        (True, 1, False),
        (1, True, False),
        (None, False, False),
        ("1", 1, False),
        ([1, [2.0]], [1, [2]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1, "b": 1}, {"a": 1}, False),
        (float("nan"), 1.0, False),
        (10**400, 1.5, False),
        (10**400, 10**400, True),
        ([], {}, False),
    ],
)
def test_values_are_compared(found: Any, expected: Any, same: bool) -> None:
    assert same_value(found, expected, 1e-6) is same


def test_which_program_counts() -> None:
    assert program_of("```python\na\n```\n```py\nb\n```\n```bash\nc\n```") == "b\n"
    assert program_of("```\na\n```") == "a\n"
    assert program_of("```cpp\na\n```") is None
    assert program_of("```python\nnever closed") is None
    assert program_of("print(1)") == "print(1)"
    assert program_of("  ") is None
    assert Code()(Sample(prompt="", response="", answer=json.dumps(ADD))) == Verdict(0.0, "no Python code block")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "{}",
        '{"inputs": [], "outputs": []}',
        '{"inputs": ["1"], "outputs": []}',
        '{"inputs": [1], "outputs": ["1"]}',
        '{"inputs": ["1"], "outputs": [1]}',
        '{"inputs": ["1"], "outputs": [1], "fn_name": "f"}',
        '{"inputs": ["1"], "outputs": ["1"], "asserts": []}',
        '{"inputs": [[1]], "outputs": [1], "fn_name": 5}',
        '{"inputs": [[1]], "outputs": [1], "fn_name": ""}',
        '{"inputs": [[1]], "outputs": [1], "fn_name": "Solution.f"}',
        '{"inputs": [[1]], "outputs": [1], "fn_name": "class"}',
        '{"inputs": [[1]], "outputs": [Infinity], "fn_name": "f"}',
        '{"inputs": [[1]], "outputs": [{"a": [1, NaN]}], "fn_name": "f"}',
        '{"inputs": [[1]], "outputs": [1e999], "fn_name": "f"}',
        '{"inputs": ' + "[" * 100000 + "]" * 100000 + ', "outputs": [1], "fn_name": "f"}',
    ],
)
def test_answers_that_hold_no_tests(answer: str) -> None:
    with pytest.raises(ValueError, match="code: "):
        read_tests(answer)


def test_what_may_be_given_is_more_than_what_may_be_expected() -> None:
    tests = {"fn_name": "f", "inputs": [[float("inf")]], "outputs": [True]}
    assert check("def f(x): return x > 10 ** 400", tests).score == 1.0
    assert read_tests('{"inputs": ["x"], "outputs": ["inf"]}').outputs == ["inf"]  # a script may print it


def test_large_tests_do_not_fill_the_process() -> None:
    """Of many problems, only the last are kept; a megabyte of text is several of parsed lists."""
    lengths = "1 " * 250_000

    def grown_mb(first: int, last: int) -> float:
        tracemalloc.start()
        for i in range(first, last):
            read_tests(json.dumps({"inputs": [f"{i} {lengths}"], "outputs": ["3"]}))
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return current / 1e6

    assert grown_mb(0, 24) < 8 * 1.1


def test_knobs() -> None:
    for knobs in (
        {"time_s": 0},
        {"memory_mb": -1},
        {"num_processes": 0},
        {"output_kb": 1.5},
        {"time_s": 9.0, "total_s": 1.0},
        {"tolerance": -1.0},
    ):
        with pytest.raises(ValueError, match=r"Code\.\w+ = .*, but it must be"):
            Code(**knobs)


def test_the_deadline_leaves_time_to_say_that_a_program_is_slow() -> None:
    check_verifier("mine", Code(total_s=8.0), 10.0)
    both = Weighted((Code(), Code()), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"'both' may take 20 s \(10 s by total_s, .* rewards.deadline_s = 10"):
        check_verifier("both", both, 10.0)


WITHOUT_NAMESPACES = """
from sae_rl.sandbox.inside import filter_system_calls
from sae_rl.sandbox.probe import chosen
from sae_rl.sandbox.system_calls import system_call_filter

filter_system_calls(system_call_filter())
chosen()
"""


def test_where_namespaces_are_forbidden_the_way_out_is_said() -> None:
    """As in a default container, whose filter of system calls refuses namespaces as well."""
    command = ["setpriv", "--no-new-privs", sys.executable, "-c", WITHOUT_NAMESPACES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("OSError: programs cannot be isolated on this machine (bubblewrap: ")
    assert re.search(r"unshare: .*Operation not permitted\)", error)
    assert "Install bubblewrap. Where user namespaces are forbidden" in error and "docs/sandbox.md" in error


def test_the_numbers_of_system_calls_are_those_of_the_kernel() -> None:
    headers = {
        0: ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
        1: ("/usr/include/asm-generic/unistd.h",),
    }
    others = {"clone": CLONE, "clone3": CLONE3, "socketpair": SOCKETPAIR}
    for column, paths in headers.items():
        text = next((Path(path).read_text() for path in paths if Path(path).exists()), None)
        if text is None:
            pytest.skip("the kernel's headers are not installed")
        numbers = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        for name, call in (REFUSED | others).items():
            if name in numbers:  # older headers lack the newest calls
                assert numbers[name] == call[column], name
            else:
                assert call[column] > 420, name
        assert len(REFUSED.keys() & numbers.keys()) > 15


def answered(code: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would make of a call: runs the filter, one instruction after the other."""
    data = struct.pack("IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at, held = 0, 0
    while True:
        operation, true, false, k = struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if operation == LOAD:
            (held,) = struct.unpack_from("I", data, k)
        elif operation == RETURN:
            return int(k)
        else:
            at += true if (held == k if operation == EQUAL else held & k) else false


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_refuses_these_calls_and_no_others(machine: str) -> None:
    architecture, column = MACHINES[machine]
    code = assembled(architecture, column)

    def is_allowed(number: int, *arguments: int) -> bool:
        return answered(code, architecture, number, *arguments) == ALLOW

    by_argument = {
        CLONE: ((0x11, 0x1200011), (0x10000011, 0x20000)),  # SIGCHLD, with thread ids; namespaces of users, of mounts
        SOCKETPAIR: ((1,), (2, 10)),
        CLONE3: ((), (0,)),
    }
    for call, (allowed, refused) in by_argument.items():
        assert [is_allowed(call[column], value) for value in (*allowed, *refused)] == [True] * len(allowed) + [
            False
        ] * len(refused), call
    whole = {numbers[column] for numbers in REFUSED.values()}
    assert {n for n in range(600) if not is_allowed(n)} == whole | {CLONE3[column], SOCKETPAIR[column]}
    other = next(each for each, _ in MACHINES.values() if each != architecture)
    assert answered(code, other, 0) != ALLOW and answered(code, architecture, 0x40000000) != ALLOW


REFUSED_CALLS = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def error(number):
    return ctypes.get_errno() if number == -1 else 0
def number(call):
    try: call()
    except OSError as error: return error.errno
    return 0
found = [number(lambda: os.memfd_create("x")), number(socket.socket)]
found += [error(libc.unshare(0x10000000)), error(libc.ptrace(0, 0, 0, 0))]
"""


@pytest.fixture(params=get_args(Isolation))
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    """Each isolation that works on this machine, as if it had been chosen."""
    isolation: Isolation = request.param
    if (problem := problem_with(isolation)) is not None:
        pytest.skip(f"{isolation}: {problem}")
    monkeypatch.setattr("sae_rl.rewards.code.chosen", lambda: isolation)
    return isolation


@pytest.mark.usefixtures("isolation")
def test_scripts_and_functions_run_behind_the_filter() -> None:
    tests: dict[str, Any] = {"inputs": [""] * 2, "outputs": ["[1, 1, 1, 1]"] * 2}
    assert check(f"{REFUSED_CALLS}print(found)", tests).why == "all 2 tests pass"
    tests = {"fn_name": "f", "inputs": [[]], "outputs": [[1, 1, 1, 1]]}
    assert check(f"{REFUSED_CALLS}def f(): return found", tests).why == "all 1 tests pass"


ORDINARY = """
import os, random, subprocess, tempfile, threading
subprocess.run(["true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
random.SystemRandom().random()
with tempfile.TemporaryFile() as file: file.write(b"x")
thread = threading.Thread(target=os.listdir, args=("/etc",)); thread.start(); thread.join()
print(len(open("/dev/urandom", "rb").read(8)), os.getcwd(), [os.access(path, os.R_OK) for path in ("/etc", "/dev", "/usr")])
"""


@pytest.mark.usefixtures("isolation")
def test_programs_find_what_they_usually_need() -> None:
    assert check(ORDINARY, {"inputs": [""], "outputs": ["8 /tmp [True, True, True]"]}).why == "all 1 tests pass"


def test_reward_processes_use_what_the_driver_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lose time of their first check if they tried by themselves."""
    monkeypatch.setattr("sae_rl.sandbox.probe.CHOSEN", ["nothing"])
    monkeypatch.setattr("sae_rl.rewards.pool.chosen", lambda: "unshare")
    program = (
        "```python\nimport os\nprint(os.getppid() > 4)\n```"  # unshare starts a shell that runs others before Python
    )
    for verifier in ("code", "both"):
        verifiers = {"both": Weighted((Weighted((Code(),), (1.0,)),), (1.0,))}
        with make_pool(deadline_s=20.0, memory_gb=2.0, verifiers=verifiers) as pool:
            asked = replace(rollout("code", 0, program, json.dumps(ADD)).prompt, reward=verifier)
            (outcome,) = score(pool, [replace(rollout("code", 0, program), prompt=asked)]).outcomes
        assert "found 'True'" in outcome.why
