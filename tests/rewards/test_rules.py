"""Format, language, length and repetition."""

from __future__ import annotations

import time

import pytest

from sae_rl.rewards.rules import Format, Language, Overlong, Repetition
from sae_rl.rewards.verdict import Sample, Verdict, Verifier

TAGGED = Format(tags=("think", "answer"))


def said(verifier: Verifier, response: str, *, prompt: str = "", num_tokens: int = 0) -> Verdict:
    return verifier(Sample(prompt=prompt, response=response, answer="", num_tokens=num_tokens))


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("<think>a</think><answer>b</answer>", ""),
        ("<think></think> so \n <answer>b</answer>.", ""),
        ("<think>a<answer>b</answer>", "</think> 0 times"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "<answer> 2 times"),
        ("<answer>b</answer><think>a</think>", "<answer> too early: the order is think, answer"),
        ("<think>a<answer></think>b</answer>", "<answer> too early"),
        ("</think>a<think><answer>b</answer>", "</think> too early"),
        ("", "<think> 0 times"),
    ],
)
def test_tags_in_their_order_once_each(response: str, why: str) -> None:
    verdict = said(TAGGED, response)
    assert verdict.score == float(not why)
    assert why in verdict.why


def test_a_prompt_may_open_the_first_tag() -> None:
    response = "a</think><answer>b</answer>"
    assert said(TAGGED, response).score == 0.0
    assert said(TAGGED, response, prompt="Question. <think>\n").score == 1.0
    assert said(TAGGED, f"<think>{response}", prompt="Question. <think>\n").score == 0.0


def test_nothing_but_tags() -> None:
    strict = Format(tags=("think", "answer"), only_tags=True)
    assert said(strict, " <think>a</think>\n<answer>b</answer>\n").score == 1.0
    for left, between, right in (("x", "", ""), ("", "x", ""), ("", "", "x")):
        response = f"{left}<think>a</think>{between}<answer>b</answer>{right}"
        assert said(TAGGED, response).score == 1.0
        assert said(strict, response) == Verdict(0.0, "has text outside of think, answer")


def test_patterns() -> None:
    for anywhere, expected in ((False, 0.0), (True, 1.0)):
        assert said(Format(pattern=r"\d+", anywhere=anywhere), "is 42.").score == expected
    assert said(Format(pattern=r"a.*b"), "a\n b").score == 1.0, "a dot is any character, line breaks too"
    assert said(Format(pattern="x+"), "y") == Verdict(0.0, "does not match x+")
    both = Format(pattern=r".*<answer>\d+</answer>", tags=("answer",))
    assert said(both, "<answer>4</answer>").score == 1.0
    assert said(both, "<answer>four</answer>").score == 0.0


def test_a_pattern_without_end_is_a_failed_check() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"found no end within Format.timeout_s = 0.2 on 62 characters"):
        said(Format(pattern=r"(a|aa|a?a)+b", timeout_s=0.2), "a" * 60 + "cb")
    assert time.monotonic() - started < 10


def test_bad_knobs_of_format() -> None:
    for knobs, message in (
        ({}, "neither a pattern nor tags"),
        ({"pattern": "("}, r"Format.pattern = '\(' is no regular expression"),
        ({"tags": ("<think>",)}, "different names without <"),
        ({"tags": ("a", "a")}, "different names"),
        ({"pattern": "a", "only_tags": True}, "Format.tags is empty"),
        ({"pattern": "a", "timeout_s": 0.0}, "Format.timeout_s = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Format(**knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("script", "text", "score"),
    [
        ("latin", "The answer is 42 — naïvely.", 1.0),
        ("latin", "所以答案是 42。", 0.0),
        ("cjk", "所以答案是 42。", 1.0),
        ("chinese", "所以答案是 42。", 1.0),
        ("japanese", "こたえは四十二です。", 1.0),
        ("chinese", "こたえは", 0.0),
        ("korean", "정답은 42입니다.", 1.0),
        ("cyrillic", "Ответ: 42.", 1.0),
        ("latin", "Ответ: 42.", 0.0),
        ("greek", "Η απάντηση", 1.0),
        ("arabic", "الجواب", 1.0),
        ("latin", "42 + 1 = 43", 1.0),
        ("latin", "", 1.0),
        ("latin", "\uff41\uff42\uff43", 1.0),  # full-width letters
    ],
)
def test_language(script: str, text: str, score: float) -> None:
    assert said(Language(script), text).score == score


def test_fractions_of_a_language() -> None:
    mixed = "a" * 8 + "所以"
    assert said(Language("latin", 0.8), mixed) == Verdict(1.0, "80.0 % of 10 letters are latin")
    assert said(Language("latin", 0.81), mixed).score == 0.0
    with pytest.raises(ValueError, match=r"Language.script = 'klingon', allowed: latin, cjk"):
        Language("klingon")
    with pytest.raises(ValueError, match=r"Language.min_fraction = 1.5, but it must be in \[0, 1\]"):
        Language("latin", 1.5)


@pytest.mark.parametrize(
    ("num_tokens", "score"), [(0, 0.0), (12_288, 0.0), (14_336, -0.5), (15_360, -0.75), (16_384, -1.0), (20_000, -1.0)]
)
def test_overlong_is_dapos_equation_13(num_tokens: int, score: float) -> None:
    """L_max = 16,384 and L_cache = 4,096: 0, then ((L_max - L_cache) - |y|) / L_cache, then -1."""
    overlong = Overlong(max_tokens=16_384, buffer_tokens=4_096)
    assert said(overlong, "", num_tokens=num_tokens).score == score
    halved = Overlong(max_tokens=16_384, buffer_tokens=4_096, penalty=0.5)
    assert said(halved, "", num_tokens=num_tokens).score == score / 2


def test_repetition() -> None:
    assert said(Repetition(num_words=2), "a b c d e").score == 0.0
    assert said(Repetition(num_words=2), "a b a b a") == Verdict(-0.5, "50.0 % of runs of 2 words are repeated")
    assert said(Repetition(num_words=2, penalty=3.0), "a b a b a").score == -1.5
    assert said(Repetition(num_words=9), "a b").score == 0.0


def test_bad_knobs_of_penalties() -> None:
    for make, message in (
        (lambda: Overlong(10, 0), r"Overlong.buffer_tokens = 0, but it must be in \[1, max_tokens = 10\]"),
        (lambda: Overlong(10, 11), "Overlong.buffer_tokens = 11"),
        (lambda: Overlong(10, 5, -1.0), "Overlong.penalty = -1"),
        (lambda: Repetition(0), "Repetition.num_words = 0"),
        (lambda: Repetition(2, float("inf")), "Repetition.penalty = inf"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
