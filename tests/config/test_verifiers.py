"""Verifiers from YAML: every one is built with its knobs, and a wrong knob is named with what it might have been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sae_rl.rewards.functions import Function
from sae_rl.rewards.rules import Format, Language, Overlong, Repetition

from sae_rl.commands.assemble import verifier_warnings
from sae_rl.config.compose import load_config
from sae_rl.rewards.choice import Choice
from sae_rl.rewards.code import Code
from sae_rl.rewards.exact import Exact
from sae_rl.rewards.http import Http
from sae_rl.rewards.math.verifier import Math
from sae_rl.rewards.math_verify import MathVerify
from sae_rl.rewards.numeric import Numeric
from sae_rl.rewards.reasoning_gym import ReasoningGym
from sae_rl.rewards.table import READY, VERIFIERS, check_deadline, resolve
from sae_rl.rewards.weighted import Weighted
from sae_rl.settings import ConfigError
from sae_rl.types import Prompt

# What is written in rewards.verifiers, and what it is then.
WRITTEN: dict[str, Any] = {
    "{name: math, precision: 4, boxed_only: true}": Math(4, True),
    "{name: math}": Math(),
    "{name: math_verify}": MathVerify(),
    "{name: numeric, relative: 0.01, absolute: 1, boxed_only: true}": Numeric(0.01, 1.0, True),
    "{name: choice, letters: ABCDE}": Choice("ABCDE"),
    "{name: code, partial: true, total_s: 9}": Code(partial=True, total_s=9.0),
    "{name: exact, ignore_case: true}": Exact(True),
    "{name: format, tags: [think, answer], only_tags: true}": Format(tags=("think", "answer"), only_tags=True),
    "{name: format, pattern: 'a+', anywhere: true, timeout_s: 2}": Format(pattern="a+", anywhere=True, timeout_s=2.0),
    "{name: language, script: cjk, min_fraction: 0.5}": Language("cjk", 0.5),
    "{name: overlong, max_tokens: 100, buffer_tokens: 20, penalty: 0.5}": Overlong(100, 20, 0.5),
    "{name: repetition, num_words: 4, penalty: 0.5}": Repetition(4, 0.5),
    "{name: http, url: 'http://127.0.0.1:1/', timeout_s: 3, retries: 1, backoff_s: 0}": Http(
        "http://127.0.0.1:1/", 3.0, 1, 0.0
    ),
    "{name: reasoning_gym}": ReasoningGym(),
    "{name: function, path: 'sae_rl.tasks.level:level'}": Function("sae_rl.tasks.level:level"),
    "{name: weighted, parts: [{name: math}, {name: overlong, max_tokens: 9, buffer_tokens: 3}], weights: [1, 0.5]}": Weighted(
        (Math(), Overlong(9, 3)), (1.0, 0.5)
    ),
}
WRONG = {
    "{name: mathh}": ["name 'mathh' is unknown", "did you mean 'math'?"],
    "{name: math, precison: 4}": ["math has no knob 'precison'", "did you mean 'precision'?"],
    "{name: math, precision: 0}": ["Math.precision = 0", "at least 1"],
    "{name: numeric, relativ: 1}": ["numeric has no knob 'relativ'", "did you mean 'relative'?"],
    "{name: numeric, relative: much}": ["relative: found 'much'", "number"],
    "{name: choice, letters: abc}": ["Choice.letters = 'abc'"],
    "{name: format}": ["neither a pattern nor tags"],
    "{name: format, tags: think}": ["tags: found 'think'"],
    "{name: language, script: klingon}": ["Language.script = 'klingon'", "latin"],
    "{name: overlong, max_tokens: 9}": ["buffer_tokens is missing"],
    "{name: http, url: nowhere}": ["Http.url = 'nowhere'"],
    "{name: http}": ["url is missing"],
    "{name: weighted, parts: [{name: matth}], weights: [1]}": ["name 'matth' is unknown", "did you mean 'math'?"],
}


def load(folder: Path, written: str) -> Any:
    return load_config(
        [
            "model.path=nobody/nothing",
            "model.context_tokens=1024",
            f"output_dir={folder}",
            f"+rewards.verifiers.mine={written}",
        ]
    )


@pytest.mark.parametrize("written", WRITTEN)
def test_a_verifier_is_built_from_the_configuration(written: str, tmp_path: Path) -> None:
    config = load(tmp_path, written)
    assert config.rewards.verifiers["mine"] == WRITTEN[written]
    assert resolve("mine", config.rewards.verifiers) == WRITTEN[written]


def test_every_verifier_is_written_above() -> None:
    assert {type(verifier) for verifier in WRITTEN.values()} == set(VERIFIERS.values())


@pytest.mark.parametrize("written", WRONG)
def test_a_wrong_knob_is_named(written: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, written)
    for part in ["rewards.verifiers", *WRONG[written]]:
        assert part in str(error.value)


def test_a_verifier_that_needs_knobs_is_not_ready() -> None:
    assert {"math", "numeric", "choice", "exact"} <= set(READY)
    for name in ("format", "overlong", "http", "function", "weighted"):
        with pytest.raises(ValueError, match=f"{name!r} needs knobs: give it a name in rewards.verifiers"):
            resolve(name, {})


def test_what_a_run_cannot_prevent_is_said_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(tmp_path, "{name: code, isolation: limits}")
    prompt = Prompt(id="a", text="q", token_ids=(1,), answer="", task="t", reward="mine")
    (said,) = verifier_warnings(config, [prompt, prompt, replace(prompt, reward="math")])
    assert said.startswith("code sandbox: ")
    assert verifier_warnings(config, [replace(prompt, reward="math")]) == []

    def refuse(how: str) -> None:
        raise OSError("the code sandbox cannot run here (nothing is installed)")

    monkeypatch.setattr("sae_rl.rewards.code.chosen", refuse)
    with pytest.raises(ConfigError, match=r"rewards.verifiers: the code sandbox cannot run here \(nothing is"):
        verifier_warnings(config, [prompt])


@pytest.mark.parametrize(
    ("verifier", "told"),
    [
        (Code(), "10 s by total_s, and 2 s to end the programs"),
        (Http("http://a"), "9.75 s by timeout_s, retries and backoff_s"),
        (Http("http://a", timeout_s=1.0, retries=0), "1 s by timeout_s, retries and backoff_s"),
        (Format(pattern="a", timeout_s=2.0), "2 s by timeout_s"),
        (Weighted((Format(pattern="a"), Math(), Code()), (1, 1, 1)), "11 s (1 s by timeout_s and 10 s by total_s"),
    ],
)
def test_time_limits_of_a_verifier_fit_into_the_deadline(verifier: Any, told: str) -> None:
    """A check that is killed at the deadline cannot say what was late."""
    check_deadline("mine", verifier, 11.0)
    with pytest.raises(ValueError) as error:
        check_deadline("mine", verifier, 0.9)
    for part in (
        "reward 'mine' may take",
        told,
        "rewards.deadline_s = 0.9: raise it, or lower these in rewards.verifiers",
    ):
        assert part in str(error.value)


def test_defaults_fit_into_the_default_deadline(tmp_path: Path) -> None:
    deadline_s = load(tmp_path, "{name: math}").rewards.deadline_s
    for name, verifier in {**READY, "http": Http("http://a"), "format": Format(pattern="a")}.items():
        check_deadline(name, verifier, deadline_s)
