"""Programs that a model wrote, against unit tests. They run in the sandbox, which never knows the expected outputs."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any, cast

from sae_rl.knobs import Knobs, integer, number
from sae_rl.rewards.verdict import Sample, TimeLimit, Verdict, shown
from sae_rl.sandbox.inside import Answer
from sae_rl.sandbox.isolation import Limits
from sae_rl.sandbox.probe import chosen
from sae_rl.sandbox.programs import Ended, run_program

FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
PYTHON = {"", "python", "python3", "py"}
ENDING_S = 2.0  # a sandbox has started and ended within this time, beside the time of its program
CACHED_TESTS = 4  # problems whose tests a process keeps; the tests of one may have megabytes


@dataclass(frozen=True, slots=True)
class Tests:
    """The unit tests of one problem."""

    inputs: list[Any]  # texts for stdin, or lists of arguments
    outputs: list[Any]  # texts on stdout, or returned values
    function: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Code(Knobs):
    """1 if the Python program in the last code block passes all unit tests.

    The answer is JSON in the form of APPS, TACO and verl's prime_code: ``{"inputs": [...], "outputs": [...]}`` with the
    stdin and the stdout of each test. With ``"fn_name"``, the name of a function or of a method of a class ``Solution``,
    inputs are lists of arguments and outputs are returned values.

    Outputs are compared line by line and word by word, without spaces at the ends of lines and empty lines at the end.
    Where a number with a decimal point is expected, the found one may differ by ``tolerance``. Returned values must be
    equal as JSON, with the same tolerance for floats.
    """

    time_s: float = number(4.0, low=0, above_low=True)  # for one test of a script
    total_s: float = number(8.0, low=0, above_low=True)  # for all tests of a response; tests that come later fail
    memory_mb: int = integer(512, low=1)
    num_processes: int = integer(16, low=1)  # processes and threads
    output_kb: int = integer(1024, low=1)
    partial: bool = False  # score the fraction of tests that pass, instead of 0 or 1
    tolerance: float = number(1e-6, low=0)  # absolute, or relative to the expected number

    def check_together(self) -> None:
        if self.total_s < self.time_s:
            raise ValueError(f"Code.total_s = {self.total_s:g}, but it must be at least time_s = {self.time_s:g}")

    def time_limit(self) -> TimeLimit:
        return TimeLimit(self.total_s + ENDING_S, f"total_s, and {ENDING_S:g} s to end the programs")

    def read_answer(self, answer: str) -> Tests:
        """The tests. Raises ValueError as `read_tests`."""
        return read_tests(answer)

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError for an answer that holds no tests, and OSError if programs cannot be isolated here."""
        tests = self.read_answer(sample.answer)
        program = program_of(sample.response)
        if program is None:
            return Verdict(0.0, "no Python code block")
        problems = self._problems(program, tests)
        num_tests, num_passed = len(tests.inputs), problems.count(None)
        if num_passed == num_tests:
            return Verdict(1.0, f"all {num_tests} tests pass")
        first = next(i for i, problem in enumerate(problems) if problem is not None)
        why = f"{num_passed} of {num_tests} tests pass; test {first + 1}: {problems[first]}"
        return Verdict(num_passed / num_tests if self.partial else 0.0, why)

    def _problems(self, program: str, tests: Tests) -> list[str | None]:
        """What is wrong with each test, None if it passes. Without ``partial``, the list ends with the first problem."""
        limits = Limits(
            time_s=self.time_s, memory_mb=self.memory_mb, num_processes=self.num_processes, output_kb=self.output_kb
        )
        problems: list[str | None] = []
        deadline = time.monotonic() + self.total_s
        while len(problems) < len(tests.inputs):
            first = len(problems)
            # Most wrong programs fail the first test of a script, so it runs alone; the others share a sandbox.
            last = first + 1 if first == 0 and not self.partial and tests.function is None else len(tests.inputs)
            ended = run_program(
                program,
                tests.inputs[first:last],
                function=tests.function,
                limits=limits,
                isolation=chosen(),
                total_s=deadline - time.monotonic(),
                stop_early=not self.partial,
            )
            for i in range(first, last):
                problem = self._problem(ended, i - first, tests.outputs[i], is_script=tests.function is None)
                problems.append(problem)
                if problem is not None and not self.partial:
                    return problems
        return problems

    def _problem(self, ended: Ended, i: int, expected: Any, is_script: bool) -> str | None:
        """What is wrong with answer ``i``, None if nothing is."""
        if i >= len(ended.answers):
            return {
                "time": f"all tests together took more than {self.total_s:g} s",
                "memory": f"it took more than {self.memory_mb} MB",
                "exit": f"exit code {ended.code}: {last_line(ended.stderr)}",
            }[ended.ending]
        answer = ended.answers[i]
        if not isinstance(answer, dict) or (is_script and answer.keys() != Answer.__annotations__.keys()):
            return "what it answered cannot be read"
        if is_script:
            return self._wrong_output(cast(Answer, answer), expected)
        if "returned" not in answer:
            return f"it raised {shown(str(answer.get('raised')))}"
        if same_value(answer["returned"], expected, self.tolerance):
            return None
        return f"expected {shown(json.dumps(expected))}, found {shown(str(answer['returned']))}"

    def _wrong_output(self, answer: Answer, expected: str) -> str | None:
        if answer["ending"] == "time":
            return f"it ran longer than {self.time_s:g} s"
        if answer["ending"] == "output":
            return f"it wrote more than {self.output_kb} KB"
        if answer["code"] != 0:
            return f"exit code {answer['code']}: {last_line(answer['stderr'])}"
        return different(answer["stdout"], expected, self.tolerance)


@lru_cache(maxsize=CACHED_TESTS)  # responses to one prompt are checked one after the other
def read_tests(answer: str) -> Tests:
    """The tests in a prompt's answer. Raises ValueError if it is not JSON of the form that `Code` describes."""
    form = 'code: the answer must be JSON {"inputs": [...], "outputs": [...]}, with "fn_name" for a function'
    try:
        read = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{form}; found {shown(answer)}: {error}") from None
    if not isinstance(read, dict) or not {"inputs", "outputs"} <= read.keys() <= {"inputs", "outputs", "fn_name"}:
        raise ValueError(f"{form}; found {shown(answer)}")
    inputs, outputs, function = read["inputs"], read["outputs"], read.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{form}, as many outputs as inputs and at least one; found {shown(answer)}")
    if function is not None and not (isinstance(function, str) and function.isidentifier() and not iskeyword(function)):
        raise ValueError(f'code: "fn_name" must name a function or a method of Solution; found {function!r}')
    kind = list if function is not None else str
    for i, given in enumerate(inputs):
        if not isinstance(given, kind) or (kind is str and not isinstance(outputs[i], str)):
            wanted = "a list of arguments" if function is not None else "text, and so must its output"
            raise ValueError(f"code: input {i + 1} must be {wanted}; found {shown(json.dumps(given))}")
        try:
            json.dumps(outputs[i], allow_nan=False)
        except ValueError:
            message = f"code: output {i + 1} contains Infinity or NaN, which no returned value equals"
            raise ValueError(message) from None
    return Tests(inputs, outputs, function)


def program_of(response: str) -> str | None:
    """The last closed code block of Python, or a whole response that has no code fence; None if there is neither."""
    if "```" not in response:
        return response.strip() or None
    blocks = [text for language, text in FENCE.findall(response) if language.lower() in PYTHON]
    return blocks[-1] if blocks else None


def last_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    return shown(lines[-1]) if lines else "nothing on stderr"


def different(found: str, expected: str, tolerance: float) -> str | None:
    """The first difference of two outputs; None if there is none."""
    lines, wanted = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (found, expected))
    for i, want in enumerate(wanted):
        if i >= len(lines):
            return f"expected {len(wanted)} lines, found {len(lines)}"
        if lines[i] != want and not same_words(lines[i].split(), want.split(), tolerance):
            return f"line {i + 1}: expected {shown(want)}, found {shown(lines[i])}"
    return f"expected {len(wanted)} lines, found {len(lines)}" if len(lines) > len(wanted) else None


def same_words(found: list[str], expected: list[str], tolerance: float) -> bool:
    return len(found) == len(expected) and all(
        word == want or ("." in want and near(word, want, tolerance))
        for word, want in zip(found, expected, strict=True)
    )


def near(found: float | str, expected: float | str, tolerance: float) -> bool:
    """Whether two numbers, or the texts of two numbers, are finite and differ by no more than the tolerance."""
    try:
        number = float(found)
        return math.isfinite(number) and math.isclose(number, float(expected), rel_tol=tolerance, abs_tol=tolerance)
    except (ValueError, OverflowError):  # a word, or an integer that is too large
        return False


def same_value(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal. true and false are not numbers."""
    types = {type(found), type(expected)}
    if types == {list}:
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(same_value(a, b, tolerance) for a, b in pairs)
    if types == {dict}:
        same_keys = found.keys() == expected.keys()
        return same_keys and all(same_value(found[key], value, tolerance) for key, value in expected.items())
    if types == {float} or types == {int, float}:
        return near(found, expected, tolerance)
    return len(types) == 1 and bool(found == expected)
