"""The form of responses: tags and regular expressions."""

from __future__ import annotations

import time

import pytest

from sae_rl.rewards.format import Format
from sae_rl.rewards.verdict import Sample, Verdict

TAGGED = Format(tags=("think", "answer"))


def said(verifier: Format, response: str, *, prompt: str = "") -> Verdict:
    return verifier(Sample(prompt=prompt, response=response, answer=""))


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
        ({"pattern": "("}, r"Format.pattern = '\(' is not a regular expression"),
        ({"tags": ("<think>",)}, "different names without <"),
        ({"tags": ("a", "a")}, "different names"),
        ({"pattern": "a", "only_tags": True}, "Format.tags is empty"),
        ({"pattern": "a", "timeout_s": 0.0}, "Format.timeout_s = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Format(**knobs)  # type: ignore[arg-type]
