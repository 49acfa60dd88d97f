"""Whatever a model repeats, the answer is found in time."""

from __future__ import annotations

import importlib
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sae_rl.rewards.choice import Choice
from sae_rl.rewards.extraction.final_answer import final_answer
from sae_rl.rewards.numeric import Numeric
from sae_rl.rewards.verdict import Sample

MODULES = (
    "choice",
    "math.answers",
    "math.equality",
    "math.expressions",
    "extraction.final_answer",
    "extraction.markup",
    "extraction.numbers",
    "numeric",
)
LENGTH = 100_000
TOKENS = (
    *(
        " ",
        "\n",
        "\t",
        "1",
        ",",
        ".",
        ";",
        ":",
        "=",
        "x",
        "A",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "$",
        "$$",
        "&",
        "/",
        "~",
        "|",
    ),
    *("*", "**", "`", "```", "####", "%", "^", "_", "+", "-", "\\", "\\\\", "\\,", "\\ ", "\\(", "\\)", "\\[", "\\]"),
    *("or", "and", "is", "be", "answer", "answers", "the", "option", "not", "e", "million", "percent", "cm", "é"),
    *(
        "\\boxed{",
        "\\boxed",
        "\\text{",
        "\\text{or}",
        "\\frac{",
        "\\frac{1}",
        "\\quad",
        "\\overline{",
        "\\cdot 10^",
        "\\sqrt",
    ),
)
FORMS = (
    "%s",
    "the answer is %s",
    "Answer: 1%s",
    "\\boxed{%s",
    "\\boxed{1}%s x \\boxed{2}",
    "x = %s!",
    "\n1%s\n#",
    "A%s?",
)


@contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    """A regular expression that backtracks for ever is stopped too."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s: {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def repeated(num_texts: int, length: int) -> Iterator[str]:
    """Every token, and short random sequences of tokens, again and again."""
    rng = random.Random(1)
    units = [*TOKENS, *(f" {token}" for token in TOKENS), *(f"{token} " for token in TOKENS)]
    while len(units) < num_texts:
        units.append("".join(rng.choices(TOKENS, k=rng.randint(2, 4))))
    for i, unit in enumerate(units[:num_texts]):
        yield FORMS[i % len(FORMS)] % (unit * (length // len(unit)))


@pytest.mark.parametrize("words", [" or", " and", " or ", "\\text{or}", " or}", "or "])
@pytest.mark.parametrize("count", [17, 10_000])
def test_words_between_two_boxes(words: str, count: int) -> None:
    with limit(2.0, words):
        assert final_answer("\\boxed{1}" + words * count + " x \\boxed{2}").text == "2"


def test_long_responses() -> None:
    for text in repeated(400, LENGTH):
        sample = Sample(prompt="", response=text, answer="A")
        with limit(2.0, text[:60]):
            final_answer(text)
            Choice()(sample)
            Numeric()(Sample(prompt="", response=text, answer="5"))


@pytest.mark.parametrize("module", MODULES)
def test_every_pattern(module: str) -> None:
    """By itself, on as much as it is ever given."""
    for name, value in vars(importlib.import_module(f"sae_rl.rewards.{module}")).items():
        patterns = [part[0] for part in value] if name in ("REWRITTEN", "REPLACED") else [value]
        for pattern in (each for each in patterns if isinstance(each, re.Pattern)):
            for text in repeated(300, 400 if module == "extraction.numbers" else 4000):
                with limit(1.0, f"{name}, {pattern.pattern}, on {text[:60]}"):
                    pattern.fullmatch(text)
                    pattern.match(text)
