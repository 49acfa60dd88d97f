"""Programs that a model wrote, against unit tests. They run in the sandbox; what they should answer never enters it."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from sae_rl.rewards.verdict import Sample, Verdict
from sae_rl.sandbox.isolation import chosen
from sae_rl.sandbox.limits import Limits
from sae_rl.sandbox.programs import Ended, Sandbox

FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
PYTHON = {"", "python", "python3", "py"}
SHOWN_CHARACTERS = 80
CACHED_TESTS = 256


@dataclass(frozen=True, slots=True)
class Tests:
    """Of one problem."""

    inputs: list[Any]  # texts for stdin; or lists of arguments
    outputs: list[Any]  # texts on stdout; or what the function returns
    function: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The Python program in the last code block of a response: 1 if it passes all tests.

    The answer is JSON, ``{"inputs": [...], "outputs": [...]}`` with what goes to stdin and what must come on stdout for
    each test; or with ``"fn_name"`` as well, for a function (or a method of a class ``Solution``), inputs being lists of
    arguments and outputs values. It is the form of APPS, TACO and verl's prime_code.

    Outputs are compared line by line, without white space at the ends of lines and empty lines at the end, and word by
    word, where two numbers may differ by ``tolerance`` if one is expected that has a decimal point. Values have to be equal
    JSON, with the same tolerance for numbers that are not whole.
    """

    time_s: float = 4.0  # of one test; a function's tests run one after the other in this time for each
    total_s: float = 8.0  # of all tests of a response; beyond it the rest has failed. Keep rewards.deadline_s above it
    memory_mb: int = 512
    num_processes: int = 16
    output_kb: int = 1024
    partial: bool = False  # the fraction of tests that pass, instead of all or nothing
    tolerance: float = 1e-6  # absolute, or relative to what is expected
    isolation: Literal["auto", "bubblewrap", "unshare", "limits"] = "auto"  # auto: the strongest that works here

    def __post_init__(self) -> None:
        self._limits(self.time_s)
        if self.total_s < self.time_s or self.tolerance < 0:
            raise ValueError(
                f"code: total_s = {self.total_s:g} must be at least time_s = {self.time_s:g}, and tolerance = "
                f"{self.tolerance:g} at least 0"
            )

    def _limits(self, time_s: float) -> Limits:
        return Limits(
            time_s=time_s, memory_mb=self.memory_mb, num_processes=self.num_processes, output_kb=self.output_kb
        )

    def warnings(self) -> list[str]:
        """What a program could do here besides what it should.

        Raises:
            OSError: no program can be run here in the way that is asked for.
        """
        return chosen(self.isolation).warnings()

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError for an answer that holds no tests, and OSError where no sandbox can be made."""
        tests = read_tests(sample.answer)
        program = program_of(sample.response)
        if program is None:
            return Verdict(0.0, "no Python code block")
        problems = self._run(program, tests) if tests.function is None else self._call(program, tests)
        num_tests, num_passed = len(tests.inputs), problems.count(None)
        if num_passed == num_tests:
            return Verdict(1.0, f"all {num_tests} tests pass")
        first = next(i for i, problem in enumerate(problems) if problem is not None)
        why = f"{num_passed} of {num_tests} tests pass; test {first + 1}: {problems[first]}"
        return Verdict(num_passed / num_tests if self.partial else 0.0, why)

    def _run(self, program: str, tests: Tests) -> list[str | None]:
        """What is wrong with each test, None if it passes; without ``partial`` only as far as the first that fails."""
        problems: list[str | None] = []
        end = time.monotonic() + self.total_s
        limits = self._limits(self.time_s)
        with Sandbox(program, limits, chosen(self.isolation)) as sandbox:
            for given, expected in zip(tests.inputs, tests.outputs, strict=True):
                left_s = end - time.monotonic()
                if left_s <= 0:
                    problems.append(f"not run: the tests before it took total_s = {self.total_s:g} s")
                else:
                    ended = sandbox.run(given, min(self.time_s, left_s))
                    problems.append(
                        stopped(ended, limits) or died(ended) or different(ended.stdout, expected, self.tolerance)
                    )
                if problems[-1] is not None and not self.partial:
                    break
        return problems

    def _call(self, program: str, tests: Tests) -> list[str | None]:
        limits = self._limits(min(self.total_s, self.time_s * len(tests.inputs)))
        with Sandbox(program, limits, chosen(self.isolation), tests.function) as sandbox:
            ended = sandbox.run("".join(json.dumps(arguments) + "\n" for arguments in tests.inputs))
        answers = ended.stdout.splitlines()
        problems: list[str | None] = []
        for i, expected in enumerate(tests.outputs):
            if i >= len(answers):
                problems.append(stopped(ended, limits) or died(ended) or "it returned nothing")
            else:
                problems.append(wrong_value(answers[i], expected, self.tolerance))
        return problems


@lru_cache(maxsize=CACHED_TESTS)  # responses to one prompt are checked one after the other
def read_tests(answer: str) -> Tests:
    """Raises ValueError if that is what ``answer`` does not hold."""
    form = 'code: the answer must be JSON {"inputs": [...], "outputs": [...]}, with "fn_name" for a function'
    try:
        read = json.loads(answer)
    except ValueError as error:
        raise ValueError(f"{form}; found {shown(answer)}: {error}") from None
    if not isinstance(read, dict) or not {"inputs", "outputs"} <= read.keys() <= {"inputs", "outputs", "fn_name"}:
        raise ValueError(f"{form}; found {shown(answer)}")
    inputs, outputs, function = read["inputs"], read["outputs"], read.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{form}, as many outputs as inputs and at least one; found {shown(answer)}")
    kind = list if function is not None else str
    for i, given in enumerate(inputs):
        if not isinstance(given, kind) or (kind is str and not isinstance(outputs[i], str)):
            wanted = "a list of arguments" if function is not None else "text, and so must its output be"
            raise ValueError(f"code: input {i + 1} must be {wanted}; found {shown(json.dumps(given))}")
    return Tests(inputs, outputs, function)


def program_of(response: str) -> str | None:
    """The last closed block of Python, or all of a response without any code fence; None: other code alone, or nothing."""
    if "```" not in response:
        return response.strip() or None
    blocks = [text for language, text in FENCE.findall(response) if language.lower() in PYTHON]
    return blocks[-1] if blocks else None


def stopped(ended: Ended, limits: Limits) -> str | None:
    """The limit that ended a program."""
    return {
        "exit": None,
        "time": "it ran longer than its time",
        "memory": f"it took more than {limits.memory_mb} MB",
        "output": f"it wrote more than {limits.output_kb} KB",
    }[ended.ending]


def died(ended: Ended) -> str | None:
    """The last line of what it said, if it says that it failed."""
    said = ended.stderr.strip().splitlines()
    return None if ended.code == 0 else f"exit code {ended.code}: {shown(said[-1]) if said else 'nothing on stderr'}"


def different(found: str, expected: str, tolerance: float) -> str | None:
    """Where two outputs differ."""
    lines, wanted = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (found, expected))
    for i, want in enumerate(wanted):
        if i >= len(lines):
            return f"expected {len(wanted)} lines, found {len(lines)}"
        if lines[i] != want and not same_words(lines[i].split(), want.split(), tolerance):
            return f"line {i + 1}: expected {shown(want)}, found {shown(lines[i])}"
    return f"expected {len(wanted)} lines, found {len(lines)}" if len(lines) > len(wanted) else None


def same_words(found: list[str], expected: list[str], tolerance: float) -> bool:
    return len(found) == len(expected) and all(
        word == want or ("." in want and _is_near(word, want, tolerance))
        for word, want in zip(found, expected, strict=True)
    )


def _is_near(word: str, want: str, tolerance: float) -> bool:
    try:
        return near(float(word), float(want), tolerance)
    except ValueError:
        return False


def near(found: float, expected: float, tolerance: float) -> bool:
    return math.isfinite(found) and math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)


def wrong_value(line: str, expected: Any, tolerance: float) -> str | None:
    """What a line of `inside.run_function` says, if that is not what was expected."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return f"it returned what cannot be read: {shown(line)}"
    if not isinstance(answer, dict) or answer.keys() - {"returned", "raised"}:
        return f"it returned what cannot be read: {shown(line)}"
    if "returned" not in answer:
        return f"it raised {shown(str(answer['raised']) if answer else '')}"
    if same_value(answer["returned"], expected, tolerance):
        return None
    return f"expected {shown(json.dumps(expected))}, found {shown(line)}"


def same_value(found: Any, expected: Any, tolerance: float) -> bool:
    """Equality of JSON; true and false are no numbers."""
    if isinstance(expected, bool) or isinstance(found, bool) or not isinstance(expected, int | float | list | dict):
        return type(found) is type(expected) and bool(found == expected)
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(same_value(a, b, tolerance) for a, b in zip(found, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(same_value(found[key], value, tolerance) for key, value in expected.items())
        )
    if not isinstance(found, int | float):
        return False
    if isinstance(found, int) and isinstance(expected, int):
        return found == expected
    try:
        return near(float(found), float(expected), tolerance)
    except OverflowError:
        return False


def shown(text: str) -> str:
    text = repr(text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
