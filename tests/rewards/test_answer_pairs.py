"""The verifier `math` on answers as models write them, and on the published test cases of math-verify."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sae_rl.rewards.math.verifier import Math
from sae_rl.rewards.pool import RewardPool
from sae_rl.rewards.verdict import Failed, Sample, Verdict

from .answer_neighbours import NEIGHBOURS
from .answer_pairs import PAIRS, Pair
from .test_pool import make_pool, rollout, score

CASES = Path(__file__).parent / "math_verify_cases.json"
LAST_BOX = "boxes that prose separates are several answers, of which the last counts"
COMMA = "a comma separates thousands or the parts of an answer, never decimals"
ESCAPED = "its doubled backslashes are no LaTeX"
CONTRADICTION = "a chain of equations that contradicts itself is no answer"
ALL: dict[str, list[Pair]] = {**PAIRS, **NEIGHBOURS}
# (test, right answer, start of the prediction): where `math` disagrees with what math-verify's test expects, and why.
DELIBERATE = {
    ("test_number_extraction", "1000.99", "1000,99"): COMMA,
    ("test_number_extraction", "1,22", "1.22"): COMMA,
    ("test_number_extraction", "2.74", "Soucis"): COMMA,
    ("test_number_extraction", "0,111", "0.111"): COMMA,
    ("test_latex_notation", "$9$", "Answer $ \n 9"): "a line break inside a formula changes nothing",
    ("test_latex_notation", "$9$", "Answer \\( \n 9"): "a line break inside a formula changes nothing",
    ("test_math_extraction_additional_cases", "$10455$", "First"): "a box counts before what is said without one",
    ("test_numina_cases", r"\\boxed{W(n) = 1 \\text{ and } W(n) = -1", "W(x)"): ESCAPED,
    ("test_open_thoughts", "$$(3, 3), (1, 1)$$", r"$$\boxed{(3, 3)} \text{ for"): LAST_BOX,
    ("test_open_thoughts", r"\boxed{1} papers and \boxed{2} bins", "$"): LAST_BOX,
    ("test_string_extraction", r"$1 - \frac{1}{\mathrm{e}}$", r"$1 + \frac{1}"): "1 - 1/e is not 1 + 1/e",
    ("test_boxed", r"$\\boxed{35 cm} ++++++ \\boxed{4}$", "$"): LAST_BOX,
    ("test_math_extraction_additional_cases", "$(1,3)$", "${1,3}$"): "braces make a set, which is no tuple",
    ("test_latex_notation", "$10/9$", r"Answer $ \frac{1}{2} \$ ="): CONTRADICTION,
    ("test_relations_math", "$x = 11$", "$x = 5+5+1 = 7 =11$"): CONTRADICTION,
    ("test_relations_math", "$x = 1/3$", r"$x = 5+5+1 = 1/3"): CONTRADICTION,
    ("test_relations_math", "$z = 1 + 1 = 2$", "$z = 3+3 = 2$"): CONTRADICTION,
    (
        "test_set_rel_assymetry",
        r"$x \in [-2,7]$",
        r"$-2 \\le x",
    ): "a set and the inequality that says the same are equal",
}


@cache
def said(response: str, answer: str, precision: int = 6) -> Verdict | Failed:
    try:
        return Math(precision)(Sample(prompt="", response=response, answer=answer))
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}")


def right(response: str, answer: str, precision: int = 6) -> bool | None:
    verdict = said(response, answer, precision)
    return verdict.score == 1.0 if isinstance(verdict, Verdict) else None


@pytest.mark.parametrize("kind", ALL)
def test_answers_as_models_write_them(kind: str) -> None:
    assert [(pair, said(*pair[:2])) for pair in ALL[kind] if right(*pair[:2]) is not pair[2]] == []


def test_no_answer_is_there_twice() -> None:
    pairs = [pair[:2] for some in ALL.values() for pair in some]
    assert [pair for pair, count in Counter(pairs).items() if count > 1] == []
    assert not PAIRS.keys() & NEIGHBOURS.keys()


@pytest.mark.parametrize("pair", [p for some in PAIRS.values() for p in some if p[2]], ids=lambda pair: pair[0][:40])
def test_right_answers_have_the_text_of_the_right_answer(pair: tuple[str, str, bool]) -> None:
    """Majority votes count texts."""
    response, answer, _ = pair
    if answer.startswith('["'):
        return
    verdict, wanted = said(response, answer), said(f"\\boxed{{{answer}}}", answer)
    assert isinstance(verdict, Verdict) and isinstance(wanted, Verdict)
    assert verdict.answer == wanted.answer


def test_it_agrees_with_math_verifys_published_cases() -> None:
    cases: list[dict[str, Any]] = json.loads(CASES.read_text())["cases"]
    different, used = [], set()
    for case in cases:
        given = {"precision": case["precision"]} if "precision" in case else {}
        if right(case["prediction"], case["gold"], **given) is bool(case["expected"]):
            continue
        key = next((key for key in DELIBERATE if is_of(key, case)), None)
        if key is None:
            different.append((case, said(case["prediction"], case["gold"], **given)))
        else:
            used.add(key)
    assert different == []
    assert DELIBERATE.keys() - used == set(), "these agree by now"


def test_it_is_wrong_less_often_than_math_verify_alone() -> None:
    """Under a deadline, since math-verify has none here; a check that fails is wrong too. `math` has the usual one, so that
    a busy machine does not make it late.
    """
    pairs = [pair for some in ALL.values() for pair in some]
    num_wrong = {}
    for name, deadline_s in (("math", 10.0), ("math_verify", 2.0)):
        with make_pool(num_processes=2, deadline_s=deadline_s, memory_gb=2.0) as pool:
            asked = [rollout(name, i, response=pair[0], answer=pair[1]) for i, pair in enumerate(pairs)]
            outcomes = score(pool, asked).outcomes
        judged = [
            (pair[2], each.score == 1.0)
            for pair, each in zip(pairs, outcomes, strict=True)
            if isinstance(each, Verdict)
        ]
        errors = Counter(expected for expected, said in judged if expected is not said)
        num_wrong[name] = sum(errors.values()) + len(pairs) - len(judged)
        print(
            f"{name}: {num_wrong[name]} of {len(pairs)} wrong, {100 * num_wrong[name] / len(pairs):.1f} %: {errors[False]} "
            f"false right, {errors[True]} false wrong, {len(pairs) - len(judged)} failed"
        )
    assert num_wrong["math"] == 0 < num_wrong["math_verify"]


def is_of(key: tuple[str, str, str], case: dict[str, Any]) -> bool:
    test, gold, start = key
    prediction: str = case["prediction"]
    return case["test"].endswith(f"::{test}") and case["gold"] == gold and prediction.startswith(start)


def test_it_works_in_threads() -> None:
    pairs = [pair for kind in ("fraction", "formula", "interval", "set") for pair in PAIRS[kind]] * 2
    found: dict[int, list[float]] = {}

    def check(thread: int) -> None:
        found[thread] = [
            Math()(Sample(prompt="", response=response, answer=answer)).score for response, answer, _ in pairs
        ]

    threads = [threading.Thread(target=check, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scores = [float(expected) for *_, expected in pairs]
    assert [found[thread] for thread in range(4)] == [scores] * 4


BOMBS = {
    "tower": (r"\boxed{9^{9^{9^9}}}", "4"),
    "factorials": (r"\boxed{((((9!)!)!)!)!}", "4"),
    "sum": (r"\boxed{\sum_{k=1}^{10^{12}} \frac{1}{k^k + k!}}", "4"),
    "product": (r"\boxed{\prod_{k=1}^{10^{9}} k}", "4"),
    "binomial": (r"\boxed{\binom{10^{12}}{10^{11}}}", "4"),
    "integral": (r"\boxed{\int_0^{10^9} \sin(x^x) \cos(e^x) dx}", "4"),
    "expansion": (r"\boxed{(a+b+c+d+f+g+h)^{300}(a-b-c-d-f-g-h)^{300}}", "x"),
    "nesting": ("\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}", "4"),
    "roots": ("\\boxed{" + "\\sqrt{1+" * 35 + "2" + "}" * 35 + "}", "4"),
    "length": ("\\boxed{" + "1+x*" * 450 + "1}", "4"),
    "limit": (r"\boxed{\lim_{x \to 0} \frac{\sin(\tan(x)) - \tan(\sin(x))}{x^{7} + \arcsin(\arctan(x))^{30}}}", "4"),
    "equations": (r"\boxed{x^{11} + 7x^5 + y^9 = \sin(xy) + z^{13}}", r"x^{11} + 7x^5 + y^9 = \sin(xy) + z^{14}"),
}


def test_no_bomb_scores_and_the_pool_goes_on() -> None:
    with RewardPool(
        num_processes=2, deadline_s=2.0, memory_gb=1.0, failed_score=0.0, max_failed_fraction=1.0, verifiers={}
    ) as pool:
        mine = [rollout("math", i, response, answer) for i, (response, answer) in enumerate(BOMBS.values())]
        started = time.monotonic()
        outcomes = score(pool, mine).outcomes
        took_s = time.monotonic() - started
        for name, outcome in zip(BOMBS, outcomes, strict=True):
            print(f"{name}: {outcome.why[-100:]}")
            assert isinstance(outcome, Failed) or outcome.score == 0.0, name
        assert took_s < 2.0 * len(BOMBS) + 20
        assert score(pool, [rollout("math", 0, r"\boxed{\frac12}", "0.5")]).scores == [1.0]


def test_a_crash_inside_the_comparison_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_rl.rewards.math import formulas

    def crash(*_: Any, **__: Any) -> Any:
        raise RecursionError("too deep")

    sample = Sample(prompt="", response=r"\boxed{\sqrt{8}}", answer=r"2\sqrt{2}")
    assert Math()(sample).score == 1.0
    monkeypatch.setattr(formulas, "value_of", crash)
    with pytest.raises(RecursionError):
        Math()(sample)


def test_too_little_memory_is_a_failed_check_even_in_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_rl.rewards.math import expressions

    def swell(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(expressions.Parser, "parse", swell)
    with pytest.raises(MemoryError):
        Math()(Sample(prompt="", response=r"\boxed{\sqrt{8642}}", answer="4"))


@pytest.mark.parametrize("answer", ["", " ", r"\frac{1}{", "???", r"\boxed{}", '["1", ""]', "0/0", "}{"])
def test_a_right_answer_that_is_none_is_a_failed_check(answer: str) -> None:
    with pytest.raises(ValueError, match=r"math: the answer .* is not a number, an expression, a set or words"):
        Math()(Sample(prompt="", response=r"\boxed{1}", answer=answer))


@pytest.mark.parametrize("answer", ["9^{9^9}", r"\frac{1}{9^{9^9}}", '["1", "2^{70000}"]', r"e^{e^{e^{e^{e}}}}"])
def test_a_right_answer_that_is_too_large_is_a_failed_check(answer: str) -> None:
    with pytest.raises(ValueError, match=r"math: the answer '[^']*' cannot be compared: .* more than 20,000 digits"):
        Math()(Sample(prompt="", response=r"\boxed{1}", answer=answer))


def test_what_it_says() -> None:
    for response, answer, why, text in [
        (r"\boxed{3/4}", r"\frac{3}{4}", r"found 3/4, which equals \frac{3}{4}", "3/4"),
        (r"\boxed{8}", "7", "found 8, which is not 7", "8"),
        (r"\boxed{8}", '["7", "6"]', "found 8, which is none of 7, 6", "8"),
        (r"\boxed{)(}", "7", "found )(, which is no mathematics", ")("),
        (r"\boxed{3", "7", "no answer: the box is not closed", None),
        ("<think>3", "7", "no answer: <think> is not closed", None),
        (r"\boxed{9^{9^9}}", "7", "found 9^{9^9}, but it holds a number of more than 20,000 digits", "9^{9^9}"),
    ]:
        assert said(response, answer) == Verdict(float("equals" in why), why, text)


def test_its_knobs() -> None:
    for precision, expected in ((4, True), (6, False)):
        assert right(r"\boxed{0.3333}", r"\frac13", precision) is expected
    sample = Sample(prompt="", response="the answer is 7", answer="7")
    assert Math()(sample).score == 1.0
    assert Math(boxed_only=True)(sample) == Verdict(0.0, "no answer: no box")
    with pytest.raises(ValueError, match=r"Math.precision = 0, but it must be at least 1"):
        Math(precision=0)
