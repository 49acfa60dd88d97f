"""Verifiers of numbers within a tolerance, and of one letter among several."""

from __future__ import annotations

import pytest

from sae_rl.rewards.choice import Choice
from sae_rl.rewards.numeric import Numeric
from sae_rl.rewards.verdict import Sample, Verdict, Verifier


def said(verifier: Verifier, response: str, answer: str) -> Verdict:
    return verifier(Sample(prompt="", response=response, answer=answer))


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("The answer is 42.", "42", 1.0),
        ("so 3 + 4 = 7", "7", 1.0),
        ("It costs $1,234.50.", "1234.5", 1.0),
        (r"\boxed{1{,}234}", "1234", 1.0),
        (r"\boxed{\$12}", "12", 1.0),
        (r"\boxed{x = -3}", "-3", 1.0),
        (r"\boxed{2.9999999}", "3", 1.0),
        (r"\boxed{2.999}", "3", 0.0),
        (r"\boxed{12.5\%}", "0.125", 1.0),
        (r"\boxed{12.5\%}", "12.5", 1.0),
        (r"\boxed{12.5}", "12.5%", 1.0),
        (r"\boxed{0.125}", "12.5%", 1.0),
        (r"\boxed{6.02 \times 10^{23}}", "6.02e23", 1.0),
        (r"\boxed{6.02e22}", "6.02e23", 0.0),
        (r"\boxed{\frac{1}{8}}", "0.125", 1.0),
        (r"\boxed{3.5 million}", "3,500,000", 1.0),
        (r"\boxed{5} and then \boxed{6}", "6", 1.0),
        (r"\boxed{5, 6}", "6", 0.0),
        (r"\boxed{5 or 6}", "6", 0.0),
        ("It is 5 or 6", "6", 0.0),
        (r"\boxed{six}", "6", 0.0),
        ("nothing", "6", 0.0),
        (r"6 \boxed{}", "6", 0.0),
        (r"\boxed{1e-9}", "0", 0.0),
        (r"\boxed{1/0}", "0", 0.0),
        (r"\boxed{x = 5 \lor x = 6}", "6", 0.0),
        (r"\boxed{x = 5 or x = 6}", "6", 0.0),
        (r"\boxed{x = 5, x = 6}", "6", 0.0),
        (r"\boxed{1,000 + 500 = 1,500}", "1500", 1.0),
        ("The answer is not 6.", "6", 0.0),
        (r"It is not \boxed{6}", "6", 0.0),
        (r"\boxed{6 \text{ km}}", r"6 \text{ m}", 0.0),
        (r"\boxed{6 \text{ km}}", "6", 1.0),
        ("6" + " " * 100_000 + "= 6", "7", 0.0),
        (r"\boxed{5_{" + "1" * 5000 + "}}", "5", 0.0),
    ],
)
def test_numeric(response: str, answer: str, score: float) -> None:
    assert said(Numeric(), response, answer).score == score


def test_tolerances_of_numeric() -> None:
    assert said(Numeric(relative=0.01), r"\boxed{101}", "100").score == 1.0
    assert said(Numeric(relative=0.01), r"\boxed{101.1}", "100").score == 0.0
    assert said(Numeric(relative=0.0, absolute=0.5), r"\boxed{-0.5}", "0").score == 1.0
    assert said(Numeric(relative=0.0, absolute=0.5), r"\boxed{0.51}", "0").score == 0.0
    assert said(Numeric(boxed_only=True), "6", "6") == Verdict(0.0, "no answer: no box")


def test_what_numeric_says() -> None:
    assert said(Numeric(), r"\boxed{1.50}", "3/2") == Verdict(1.0, "found 1.50, which is 3/2", "3/2")
    assert said(Numeric(), r"\boxed{2}", "3/2") == Verdict(0.0, "found 2, which is not 3/2", "2")
    assert said(Numeric(), r"\boxed{a}", "3") == Verdict(0.0, "found a, which is not one number")
    with pytest.raises(ValueError, match="numeric: the answer 'many' is not a number"):
        said(Numeric(), "3", "many")
    for knobs, message in (
        ({"relative": -1.0}, r"Numeric.relative = -1"),
        ({"absolute": float("nan")}, "absolute = nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Numeric(**knobs)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{\text{(B) } 42}", "B"),
        (r"\boxed{B. A large cat}", "B"),
        (r"\boxed{\text{Option B}}", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The answer is (B).", "B"),
        ("The correct option is B, because A is too small.", "B"),
        ("The answer is A. No: the answer is B.", "B"),
        ("Answer: B is right because A fails", "B"),
        ("Answer: I think B", "B"),
        ("Answer: B, not A", "B"),
        ("Answer: not A but B", "B"),
        ("Answer: B. A is too small", "B"),
        ("Answer: B, I think", "B"),
        (r"\boxed{B. A large cat}", "B"),
        ("Let us think about A and C.\n\nB", "B"),
        ("A is wrong.\nB.", "B"),
        ("(B) 42", "B"),
        ("B) 42", "B"),
        ("<think>Answer: A</think>Answer: B", "B"),
        (r"Answer: A. But in fact \boxed{B}", "B"),
        ("answer: $\\textbf{B}$", "B"),
        ("答案：\\boxed{Ｂ}", "B"),
    ],
)
def test_choice(response: str, found: str) -> None:
    assert said(Choice(), response, found) == Verdict(1.0, f"found {found}, which is right", found)
    for other in "ACDJ":
        assert said(Choice(), response, other) == Verdict(0.0, f"found {found}, which is not {other}", found)


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{A or B}",
        r"\boxed{A, B}",
        r"\boxed{A/B}",
        r"\boxed{A}\boxed{B}",
        r"\boxed{\text{A and B}}",
        "Answer: A or B",
        "Answer: A, or B",
        "answer: A, maybe B",
        r"\boxed{A. and B.}",
        r"\boxed{A. or (B)}",
        "A. B. C. D.",
        "The answer is not A",
        "The answer isn't A.",
        "The answer cannot be A.",
        r"\boxed{not A}",
        r"It is not \boxed{A}",
        "The answer is A, B, C or D.",
        "Answer: (A) or (B)",
        "the answer is both A and B",
        r"\boxed{}",
        r"\boxed{B",
        r"\boxed{Z}",
        r"\boxed{ABCD}",
        "I do not know.",
        "",
        "<think>Answer: B",
    ],
)
def test_no_choice(response: str) -> None:
    for letter in "ABCD":
        verdict = said(Choice(), response, letter)
        assert (verdict.score, verdict.answer) == (0.0, None), verdict


def test_knobs_of_choice() -> None:
    assert said(Choice("AB"), r"\boxed{B}", "(B)").score == 1.0
    assert said(Choice("AB"), r"\boxed{C}", "B") == Verdict(0.0, "found no letter")
    assert said(Choice("XYZ"), r"\boxed{A or Y}", "Y").score == 1.0  # A is no letter there
    for answer in ("C", "A or B", "", "42"):
        with pytest.raises(ValueError, match="is not one letter of AB"):
            said(Choice("AB"), r"\boxed{B}", answer)
    for letters in ("A", "AA", "ab", "A1", ""):
        with pytest.raises(ValueError, match="two or more different letters of A-Z"):
            Choice(letters)
