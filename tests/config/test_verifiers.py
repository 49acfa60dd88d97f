"""Verifiers from YAML: every one is built with its knobs, and a wrong knob is named with what it might have been."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from sae_rl.config.compose import load_config
from sae_rl.rewards.choice import Choice
from sae_rl.rewards.code import Code
from sae_rl.rewards.exact import Exact
from sae_rl.rewards.format import Format
from sae_rl.rewards.function import Function
from sae_rl.rewards.http import Http
from sae_rl.rewards.math.verifier import Math
from sae_rl.rewards.math_verify import MathVerify
from sae_rl.rewards.numeric import Numeric
from sae_rl.rewards.reasoning_gym import ReasoningGym
from sae_rl.rewards.table import READY, VERIFIERS, check_verifier, resolve
from sae_rl.rewards.verdict import Sample
from sae_rl.rewards.weighted import Weighted
from sae_rl.settings import ConfigError, tree_of
from tests.conftest import Outcome

from .refused import assert_refused

PAGE = Path(__file__).parents[2] / "docs" / "verifiers.md"
# Lines of rewards.verifiers, and the verifiers that they mean.
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
    "{name: http, url: 'http://127.0.0.1:1/', timeout_s: 3, retries: 1, backoff_s: 0}": Http(
        "http://127.0.0.1:1/", 3.0, 1, 0.0
    ),
    "{name: reasoning_gym}": ReasoningGym(),
    "{name: function, path: 'sae_rl.tasks.level:level'}": Function("sae_rl.tasks.level:level"),
    "{name: weighted, parts: [{name: math}, {name: format, tags: [think]}], weights: [1, 0.5]}": Weighted(
        (Math(), Format(tags=("think",))), (1.0, 0.5)
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
    "{name: code, total_s: 1}": ["Code.total_s = 1", "at least time_s = 4"],
    "{name: code, isolation: limits}": ["code has no knob 'isolation'"],
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


def flow(node: Any) -> str:
    """A value as an override of Hydra takes it."""
    return re.sub(r"'(\w+)':", r"\1:", json.dumps(node).replace('"', "'"))


@pytest.mark.parametrize("written", WRITTEN)
def test_a_verifier_is_built_from_the_configuration(written: str, tmp_path: Path) -> None:
    config = load(tmp_path, written)
    assert config.rewards.verifiers["mine"] == WRITTEN[written]
    assert resolve("mine", config.rewards.verifiers) == WRITTEN[written]


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_verifier_is_ready_or_says_which_knob_it_needs(name: str, tmp_path: Path) -> None:
    if name in READY:
        assert load(tmp_path, f"{{name: {name}}}").rewards.verifiers["mine"] == READY[name] == VERIFIERS[name]()
        return
    with pytest.raises(ConfigError, match=r"rewards.verifiers.mine: .*(is missing|needs)"):
        load(tmp_path, f"{{name: {name}}}")
    with pytest.raises(ValueError, match=f"{name!r} needs knobs: give it a name in rewards.verifiers"):
        resolve(name, {})


@pytest.mark.parametrize("verifier", [*{**READY, **WRITTEN}.values()], ids=[*{**READY, **WRITTEN}])
def test_every_knob_can_be_written(verifier: Any, tmp_path: Path) -> None:
    assert load(tmp_path, flow(tree_of(verifier, VERIFIERS))).rewards.verifiers["mine"] == verifier


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_misspelt_knob_is_refused(name: str, tmp_path: Path) -> None:
    knobs = [field.name for field in fields(VERIFIERS[name])] or ["knob"]
    with pytest.raises(ConfigError, match=f"{name} has no knob '{knobs[0]}s'"):
        load(tmp_path, f"{{name: {name}, {knobs[0]}s: 1}}")


@pytest.mark.parametrize("written", WRONG)
def test_a_wrong_knob_is_named(written: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, written)
    for part in ["rewards.verifiers", *WRONG[written]]:
        assert part in str(error.value)


def test_these_are_ready() -> None:
    assert set(READY) == {
        *("math", "math_verify", "numeric", "choice", "exact", "code", "reasoning_gym", "level", "countdown"),
    }


@pytest.mark.parametrize("reward", ["code", "mine"])
def test_programs_that_cannot_be_isolated_are_refused_before_anything_starts(
    train: Callable[..., Outcome], reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_rl.sandbox.probe.CHOSEN", [])
    monkeypatch.setattr("shutil.which", lambda tool: None)
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Add {i}.", "answer": "{}"}) + "\n" for i in range(8)))
    mine = "+rewards.verifiers.mine={name: weighted, parts: [{name: code, time_s: 1, total_s: 1}], weights: [1]}"
    files = [f"task.train.path={file}", f"task.evaluation.path={file}", "task.max_prompt_tokens=64"]
    outcome = train("task=file", *files, f"task.train.reward={reward}", mine)
    told = f"task.train.reward: {reward!r}: programs cannot be isolated on this machine (bubblewrap: bwrap is not installed; "
    assert_refused(outcome, told, "unshare: unshare is not installed). Install bubblewrap", "http", "docs/sandbox.md")


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
    check_verifier("mine", verifier, 11.0)
    with pytest.raises(ValueError) as error:
        check_verifier("mine", verifier, 0.9)
    for part in (
        "'mine' may take",
        told,
        "rewards.deadline_s = 0.9: raise it, or lower these in rewards.verifiers",
    ):
        assert part in str(error.value)


def test_defaults_fit_into_the_default_deadline(tmp_path: Path) -> None:
    deadline_s = load(tmp_path, "{name: math}").rewards.deadline_s
    for name, verifier in {**READY, "http": Http("http://a"), "format": Format(pattern="a")}.items():
        check_verifier(name, verifier, deadline_s)


def test_the_examples_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my.module")
    monkeypatch.setitem(sys.modules, "my", ModuleType("my"))
    monkeypatch.setitem(sys.modules, "my.module", module)
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, vars(module))
    examples = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)]
    verifiers = {name: knobs for example in examples for name, knobs in example["rewards"]["verifiers"].items()}
    built = {name: load(tmp_path, flow(knobs)) for name, knobs in verifiers.items()}
    scores = {
        name: config.rewards.verifiers["mine"](
            Sample(prompt="", response="так \\boxed{4}", answer="4", num_tokens=60)
        ).score
        for name, config in built.items()
    }
    assert scores == {"strict_math": 1.0, "right_in_latin_letters": pytest.approx(1 + 0.1 * 5 / 8), "short": 0.0}
