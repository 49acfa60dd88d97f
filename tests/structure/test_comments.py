"""Comments and docstrings of the package stand alone: none begins in the middle of a sentence."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import sae_rl.types

PACKAGE = Path(sae_rl.types.__file__).parent
CONF = PACKAGE.parent / "conf"
# The first word of a clause whose subject is somewhere else.
DANGLING = re.compile(r"\s*(of|in which|which|that it|so is|and so|the same of|behind them)\b", re.IGNORECASE)


def texts_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment and docstring."""
    source = file.read_text()
    if file.suffix == ".yaml":
        for number, line in enumerate(source.splitlines(), 1):
            if match := re.search(r"(?:^|\s)#(.*)", line):
                yield number, match[1]
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "lineno", 1), docstring


def dangling(file: Path) -> list[str]:
    lines = ["", *file.read_text().splitlines()]
    return [
        f"{file.name}:{number}: {text.strip().splitlines()[0]}"
        for number, text in texts_of(file)
        if DANGLING.match(text) and not continues(lines, number)
    ]


def continues(lines: list[str], number: int) -> bool:
    """Whether a comment goes on with the sentence of the comment line above it."""
    return lines[number].lstrip().startswith("#") and lines[number - 1].lstrip().startswith("#")


@pytest.mark.parametrize("folder", [PACKAGE, CONF], ids=["sae_rl", "conf"])
def test_no_comment_begins_in_the_middle_of_a_sentence(folder: Path) -> None:
    found = [line for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]) for line in dangling(file)]
    assert found == []


def test_the_rule_sees_what_it_forbids(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        'x = 1  # of the step\ny = 2  # steps\n# a sentence that runs\n# of course on\ndef f():\n    """Of a step."""\n'
    )
    assert dangling(file) == ["a.py:1: of the step", "a.py:5: Of a step."]
