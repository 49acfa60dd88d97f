"""A user's classes and functions are called when the configuration loads: each mistake is one line with file and line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_rl.config.compose import load_config
from sae_rl.settings import ConfigError
from tests.conftest import CommandLine, Outcome

from .refused import assert_refused

SEGMENTERS = """
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mine:
    how: str = "good"
    needs_entropies = False

    def __call__(self, batch, scores):
        opens = torch.zeros(batch.num_tokens, dtype=torch.bool)
        if self.how == "field":
            return opens.index_fill(0, batch.ofsets[:-1], True)
        if self.how == "property":
            opens[batch.lenghts] = True
        if self.how == "exception":
            raise KeyError("why")
        if self.how == "shape":
            return opens[1:]
        if self.how == "infinite":
            return opens / 0
        if self.how == "type":
            return None
        if self.how == "unasked":
            opens |= scores.entropies > 1
        if self.how == "mask":
            batch.policy_versions.view(-1, 9)
        return opens if self.how == "nothing" else opens.index_fill(0, batch.offsets[:-1], True)


@dataclass(frozen=True)
class Critic:
    how: str = "good"
    needs_critic = True

    def __call__(self, batch, scores, token_rewards, opens):
        from sae_rl.algo import td_targets
        from sae_rl.types import Targets

        if self.how == "lambda":
            return td_targets(batch, scores, token_rewards, opens, gamma=1.0, lam=torch.ones(2), value_lam=1.0)
        if self.how == "keyword":
            return Targets(advantage=token_rewards, returns=None)
        if self.how == "score":
            return Targets(advantages=scores.advantages, returns=scores.values)
        if self.how == "returns":
            return Targets(advantages=token_rewards, returns=None)
        return td_targets(batch, scores, token_rewards, opens, gamma=1.0, lam=0.9, value_lam=1.0)


@dataclass(frozen=True)
class Unsure:
    needs_critic = "perhaps"

    def __call__(self, batch, scores, token_rewards, opens):
        raise NotImplementedError


@dataclass(frozen=True)
class Unborn:
    needs_critic = True
    knob: int = 0

    def __post_init__(self):
        self.nobs

    def __call__(self, batch, scores, token_rewards, opens):
        raise NotImplementedError
"""
AT = r"mine_algo:{} \(.*/mine_algo\.py, line {}{}\): "
# Knob of the class -> what the line says: class, line of the file, its text, and the message.
SEGMENTER_ERRORS = {
    "field": (
        15,
        ": return opens.index_fill.*",
        "'Batch' object has no attribute 'ofsets', did you mean 'offsets'. Batch has ",
    ),
    "property": (
        17,
        ": opens.batch.lenghts. = True",
        "AttributeError: .*'lenghts', did you mean 'lengths'. .* num_sampled, ",
    ),
    "exception": (19, ': raise KeyError."why".', "KeyError: 'why'$"),
    "shape": (12, "", r"the result of Mine has shape \(\d+,\), but the batch has \d+ response tokens"),
    "infinite": (12, "", "the result of Mine is nan at token 0 of response 0"),
    "type": (12, "", "the result of Mine is NoneType, allowed: Tensor"),
    "unasked": (27, ": opens .= scores.entropies > 1", "TypeError: '>' not supported between .* 'NoneType' and 'int'"),
    "nothing": (
        12,
        "",
        "the result of Mine is False at the first token of response 0, but the first token of each response",
    ),
}
ESTIMATOR_ERRORS = {
    "lambda": (
        43,
        ": return td_targets.*",
        r"lam has shape \(2,\), allowed: a number, \(\d+,\) per response, or \(\d+,\) per",
    ),
    "keyword": (45, ": return Targets.*", "TypeError: .* unexpected keyword argument 'advantage'"),
    "score": (
        47,
        ": return Targets.*",
        "'Scores' object has no attribute 'advantages'; Scores has old_logprobs, values, ref",
    ),
    "returns": (38, "", "Critic needs a critic, but its returns are None"),
}
REWARDS = """
import time
from dataclasses import dataclass

from sae_rl.rewards.verdict import Verdict

CALLS = []


def good(prompt, response, answer):
    return float(response == str(int(answer)))


def field(prompt, response, answer):
    return answer.lenght


def raises(prompt, response, answer):
    return int(response) == int(answer)


def nan(prompt, response, answer):
    return float("nan")


def nothing(prompt, response, answer):
    pass


def two(prompt, response):
    return 1.0


def slow(prompt, response, answer):
    time.sleep(60)


@dataclass(frozen=True)
class Sampled:
    knob: int = 1

    def __call__(self, sample):
        return Verdict(float(sample.tokens), "counted")


def text(prompt, response, answer):
    return "1"


@dataclass(frozen=True)
class Pair:
    def __call__(self, sample):
        return 1.0, "right"
"""
REWARD_ERRORS = {
    "field": "mine_rewards:field (.*/mine_rewards.py, line 15: return answer.lenght): AttributeError: 'str' object has no",
    "raises": "mine_rewards:raises (.*line 19: return int.*): invalid literal for int() .* the right answer was '7', the "
    "response 'I do not know.'",
    "nan": "mine_rewards:nan (.*line 22): returned the score nan",
    "nothing": "mine_rewards:nothing (.*/mine_rewards.py, line 26): returned None, allowed: a number or a Verdict",
    "text": "mine_rewards:text (.*): returned '1', allowed: a number or a Verdict",
    "two": "mine_rewards:two (.*line 30): TypeError: two() takes 2 positional arguments but 3 were given",
    "sampled": "mine_rewards:Sampled (.*line 43: return Verdict.*): AttributeError: 'Sample' object has no attribute 'tokens'"
    ", did you mean 'num_tokens'? Sample has prompt, response, answer, num_tokens, truncated",
    "pair": "mine_rewards:Pair (.*line 52): returned (1.0, 'right') instead of a Verdict",
    "weighted": "weighted on prompt 1: mine_rewards:Pair (.*line 52): returned (1.0, 'right') instead of a Verdict",
    "slow": "no answer within rewards.deadline_s = 0.5 s",
}
VERIFIERS = (
    "+rewards.verifiers={sampled: {name: 'mine_rewards:Sampled'}, pair: {name: 'mine_rewards:Pair'}, "
    "weighted: {name: weighted, weights: [1, 1], parts: [{name: http, url: 'http://127.0.0.1:1/'}, "
    "{name: 'mine_rewards:Pair'}]}}"
)
TASKS = """
import random
from dataclasses import dataclass

from sae_rl.tasks.task import Problem


@dataclass(frozen=True)
class Sums:
    most: int = 9
    how: str = "good"
    name = "sums"

    def words(self):
        return (*map(str, range(2 * self.most + 1)), "+")

    def problem(self, seed, split, index):
        rng = random.Random(f"{seed}/{split}/{index}" if self.how != "random" else None)
        if self.how == "later" and index > 2:
            raise KeyError(index)
        a, b = rng.randint(0, 10**9 if self.how == "random" else self.most), rng.randint(0, self.most)
        return Problem(prompt=f"{a} + {b}", answer=a + b if self.how == "number" else str(a + b))

    def demonstration(self, problem, rng):
        return problem.answer


@dataclass(frozen=True)
class Bare:
    name = "bare"


def right(prompt, response, answer):
    return response == answer
"""
HUB = ("model.path=nobody/nothing", "model.context_tokens=1024")
SUMS = ("task=custom", "task.train.name=mine_tasks:Sums", "task.train.reward=mine_tasks:right", "task.evaluation=null")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"mine_algo": SEGMENTERS, "mine_rewards": REWARDS, "mine_tasks": TASKS}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "broken_module.py").write_text("x = 1\ny = z\n")
    (tmp_path / "unreadable.py").write_text("x = (\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config([*HUB, *overrides])
    return str(error.value)


@pytest.mark.parametrize("how", SEGMENTER_ERRORS)
def test_a_segmenter(how: str) -> None:
    line, text, message = SEGMENTER_ERRORS[how]
    found = refused(
        "algorithm/segmenter=custom", "algorithm.segmenter.name=mine_algo:Mine", f"+algorithm.segmenter.how={how}"
    )
    assert re.match("algorithm.segmenter: " + AT.format("Mine", line, text) + ".*" + message, found), found


@pytest.mark.parametrize("how", ESTIMATOR_ERRORS)
def test_an_estimator(how: str) -> None:
    line, text, message = ESTIMATOR_ERRORS[how]
    found = refused("algorithm=custom", "algorithm.estimator.name=mine_algo:Critic", f"+algorithm.estimator.how={how}")
    assert re.match("algorithm.estimator: " + AT.format("Critic", line, text) + ".*" + message, found), found


VALUE_SOURCE = """
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Mine:
    how: str = "right"
    needs_critic: ClassVar[bool] = False

    def __call__(self, batch, scores, token_rewards, opens, continuations):
        values = torch.zeros(batch.num_tokens)
        if self.how == "shape":
            return values[:-1]
        if self.how == "zero_by_zero":
            return values / 0
        if self.how == "field":
            return values + batch.reward
        at = opens.nonzero().flatten()
        if self.how == "inside":
            at = (~opens).nonzero().flatten()
        if self.how == "outside":
            at = at + batch.num_tokens
        found = continuations(at, 2, 100).nanmean(1)
        if self.how == "forgotten":
            return values.index_copy(0, at, found.float())
        return values.index_copy(0, at, found.nan_to_num(0.5).float())
"""
VALUE_ERRORS = {
    "shape": r"the result of Mine has shape \(35,\), but the batch has 36 response tokens",
    "zero_by_zero": "the result of Mine is nan at token 0 of response 0",
    "field": "'Batch' object has no attribute 'reward', did you mean 'rewards'",
    "inside": r"line 26: found = continuations.*\): place 1 opens no segment; values are measured where opens is above 0",
    "outside": "place 36 is outside of the batch, which has tokens 0 to 35",
    "forgotten": "the result of Mine is nan at token",
}


@pytest.mark.parametrize("how", [*VALUE_ERRORS, "right"])
def test_a_value_source(how: str, tmp_path: Path) -> None:
    (tmp_path / "mine_values.py").write_text(VALUE_SOURCE)
    overrides = [
        *("algorithm/value_source=custom", "algorithm.value_source.name=mine_values:Mine"),
        *(f"+algorithm.value_source.how={how}", "algorithm/segmenter=fixed_length", "algorithm.segmenter.num_tokens=2"),
    ]
    if how == "right":
        assert not load_config([*HUB, *overrides]).algorithm.needs_critic
        return
    found = refused(*overrides)
    assert re.match(r"algorithm.value_source: mine_values:Mine \(.*mine_values.py, line \d+.*\): ", found), found
    assert re.search(VALUE_ERRORS[how], found), found


def test_tokens_of_a_tool_are_tried_too() -> None:
    """The batch with a mask is made of three groups of 8 responses; fewer tokens are left than without a mask."""
    found = refused(
        "algorithm/segmenter=custom", "algorithm.segmenter.name=mine_algo:Mine", "+algorithm.segmenter.how=mask"
    )
    assert "line 29: batch.policy_versions.view(-1, 9)" in found
    assert found.endswith("this batch has an action_mask: the policy did not sample all tokens")


def test_a_plug_in_inside_of_another_member_is_tried() -> None:
    members = "algorithm.segmenter.members=[{name: low_probability}, {name: 'mine_algo:Mine', how: field}]"
    assert "'ofsets', did you mean 'offsets'?" in refused("algorithm/segmenter=union", members)


@pytest.mark.parametrize("segmenter", ["low_probability", "entropy", "surprisal", "delimiter", "minimum_length"])
def test_an_estimator_gets_the_segments_of_the_configured_segmenter(segmenter: str) -> None:
    more = {"delimiter": ["algorithm.segmenter.strings=[x]"]}.get(segmenter, [])
    load_config(
        [
            *HUB,
            "algorithm=custom",
            "algorithm.estimator.name=mine_algo:Critic",
            f"algorithm/segmenter={segmenter}",
            *more,
        ]
    )


def test_classes_that_cannot_be_made() -> None:
    estimator = ("algorithm=custom", "algorithm.estimator.name=mine_algo:{}")
    found = refused(estimator[0], estimator[1].format("Unsure"))
    assert found == "algorithm.estimator: mine_algo:Unsure.needs_critic = 'perhaps', but it must be true or false"
    found = refused(estimator[0], estimator[1].format("Unborn"))
    assert re.search(r"mine_algo:Unborn \(.*line 67: self.nobs\): AttributeError: 'Unborn' object has no", found), found
    found = refused(estimator[0], "algorithm.estimator.name=broken_module:Mine")
    assert re.search(
        r"cannot import 'broken_module:Mine': .*/broken_module.py, line 2: y = z: NameError: name 'z' is", found
    )
    found = refused(estimator[0], "algorithm.estimator.name=unreadable:Mine")
    assert re.search(
        r"cannot import 'unreadable:Mine': .*/unreadable.py, line 1: SyntaxError: '\(' was never closed", found
    )
    found = refused(estimator[0], "algorithm.estimator.name=nowhere_at_all:Mine")
    assert found.endswith("No module named 'nowhere_at_all'; put its folder into PYTHONPATH")


def data_in(folder: Path) -> list[str]:
    file = folder / "problems.jsonl"
    file.write_text(
        "".join(json.dumps({"id": str(i), "prompt": f"{i} + 6", "answer": str(i + 6)}) + "\n" for i in range(1, 9))
    )
    return ["task=file", "task.max_prompt_tokens=64", f"task.train.path={file}", f"task.evaluation.path={file}"]


@pytest.mark.parametrize("how", REWARD_ERRORS)
def test_a_verifier(how: str, tmp_path: Path) -> None:
    name = how if how in ("sampled", "pair", "weighted") else f"mine_rewards:{how}"
    deadline = ["rewards.deadline_s=0.5"] if how == "slow" else []
    found = refused(*data_in(tmp_path), VERIFIERS, f"task.train.reward={name}", *deadline)
    pattern = re.escape(REWARD_ERRORS[how]).replace(r"\.\*", ".*")
    assert re.search(pattern, found) and found.startswith("task.train.reward: ") and "\n" not in found, found


def test_a_verifier_that_only_rows_name_is_called_once_with_its_first_problem(
    tmp_path: Path, sae_rl: CommandLine, tiny_model: Path
) -> None:
    rows = [{"prompt": f"{i} + 6", "answer": str(i + 6)} for i in range(8)]
    for number, name in ((3, "good"), (4, "raises"), (5, "raises"), (6, "nan")):
        rows[number]["reward"] = f"mine_rewards:{name}"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dry_run = [
        "train",
        f"model.path={tiny_model}",
        "task=file",
        "task.train.path=rows.jsonl",
        "task.train.reward=exact",
    ]
    dry_run += ["task.max_prompt_tokens=64", "rollout.max_response_tokens=64", "rollout.prompts_per_step=2"]
    dry_run += ["learner.critic_pretraining.num_prompts=0", "dry_run=true"]
    outcome = sae_rl(*dry_run)
    said = ["error: a row's reward: mine_rewards:raises on prompt line 5: ", "right answer was '10'"]
    assert_refused(outcome, *said, "error: a row's reward: mine_rewards:nan on prompt line 7: ", lines=2)
    called = (tmp_path / "rows.jsonl").read_text().replace("raises", "good").replace("nan", "good")
    (tmp_path / "rows.jsonl").write_text(called)
    outcome = sae_rl(*dry_run)
    assert (outcome.code, outcome.stderr) == (0, "")


def test_a_good_verifier_is_called_with_the_first_problem_of_its_source(tmp_path: Path) -> None:
    """`good` raises an exception for any answer that is no number, so a made-up answer would not do."""
    load_config([*HUB, *data_in(tmp_path), "task.train.reward=mine_rewards:good"])


def test_a_task_of_ones_own_gives_prompts() -> None:
    from sae_rl.data.sources.procedural import ProceduralSource

    config = load_config([*HUB, *SUMS, "+task.train.knobs.most=5"])
    assert isinstance(config.task.train, ProceduralSource)
    record = config.task.train.first_record()
    assert record is not None and eval(record.prompt) == int(record.answer) and record.task == "sums"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+task.train.knobs.mots=5",), "mine_tasks:Sums has no knob 'mots', did you mean 'most'?"),
        (("+task.train.knobs.how=number",), "problem(0, 'train', 0) is Problem(prompt='"),
        (("+task.train.knobs.how=random",), "draw from the arguments alone"),
        (("task.train.name=mine_tasks:Bare",), "mine_tasks:Bare has no problem"),
        (("task.train.name=mine_tasks:right",), "mine_tasks:right is not a dataclass"),
        (("task.train.name=mine_tasks:Wrong",), "module mine_tasks has no 'Wrong'"),
    ],
)
def test_a_task_that_does_not_fit(overrides: tuple[str, ...], message: str) -> None:
    found = refused(*SUMS, *overrides)
    assert message in found and found.startswith("task.train"), found


def test_a_task_that_fails_later_is_named() -> None:
    from sae_rl.data.sources.procedural import ProceduralSource

    source = load_config([*HUB, *SUMS, "+task.train.knobs.how=later"]).task.train
    assert isinstance(source, ProceduralSource)
    with pytest.raises(ValueError, match=r"mine_tasks:Sums \(.*mine_tasks.py, line \d+: raise .*\): KeyError: 3"):
        source._records()


def test_the_command_line_ends_with_one_line(train: Callable[..., Outcome]) -> None:
    overrides = [
        "algorithm/segmenter=custom",
        "algorithm.segmenter.name=mine_algo:Mine",
        "+algorithm.segmenter.how=field",
    ]
    assert_refused(train(*overrides), "algorithm.segmenter: mine_algo:Mine (", "did you mean 'offsets'?")


def test_without_plug_ins_nothing_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading calls no built-in member, starts no process and reads no data."""
    from sae_rl.config import trial

    def never(*_: object, **__: object) -> None:
        raise AssertionError("called")

    for name in ("segment", "estimate", "made_up_batch", "RewardPool", "try_task"):
        monkeypatch.setattr(trial, name, never)
    monkeypatch.setattr("sae_rl.data.sources.file.FileSource.first_record", never)
    load_config([*HUB, *data_in(tmp_path)])
    load_config([*HUB, "algorithm=grpo", "task=level"])
