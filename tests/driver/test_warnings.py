"""What a run says about training that goes on and learns nothing, and the order of the lines on its console."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_rl.driver import train
from sae_rl.overlapped import train_overlapped
from sae_rl.records.records import Records
from sae_rl.records.warnings import Watch, equal_rewards, why_no_number
from sae_rl.rewards.verdict import Verdict
from sae_rl.run import Run
from sae_rl.types import Rollout

from .scripted import ScriptedWorkers, make_config, make_prompts, make_run

PRETRAINING = ["learner.critic_pretraining.num_prompts=4", "learner.critic_pretraining.max_epochs=1"]


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """All responses get this score from here on."""

    def score_all(score: float) -> None:
        def outcome(rollout: Rollout) -> Verdict:
            return Verdict(score, "no answer found")

        monkeypatch.setattr("tests.driver.scripted.outcome_of", outcome)

    return score_all


def notes_of(folder: Path, *overrides: str) -> list[str]:
    workers = ScriptedWorkers(qualities=[0.5] * 9)
    train(make_run(make_config(folder, *overrides), workers, heldout=make_prompts(3)))
    return [call.of["text"] for call in workers.asked("note")]


def test_a_step_without_any_reward_is_said_at_once_and_then_seldom(
    tmp_path: Path, scoring: Callable[[float], None]
) -> None:
    scoring(0.0)
    rewards = [note for note in notes_of(tmp_path, "steps=12") if "rewarded" in note]
    assert [note.split(":")[0] for note in rewards] == [
        "step 0",
        "step 4, for 5 steps now",
        "step 9, for 10 steps now",
    ]
    assert rewards[0].startswith("step 0: 0 of 4 responses rewarded: base model, reward or template?")
    for place in (
        "rollout/truncated_fraction",
        "0.0 % failed checks (reward/failed_fraction)",
        "the verifier says 'no answer found' of 4",
        "samples.html",
    ):
        assert place in rewards[0]


def test_equal_rewards_other_than_zero_name_the_number(tmp_path: Path, scoring: Callable[[float], None]) -> None:
    scoring(0.5)
    first, *_ = notes_of(tmp_path, "steps=1")
    assert first.startswith("step 0: all 4 responses have the reward 0.5: problems too easy")


def test_rewards_that_differ_say_nothing(tmp_path: Path) -> None:
    assert not [note for note in notes_of(tmp_path) if "responses" in note]
    assert equal_rewards([0.0, 1.0], ["", ""], {}) is None
    assert equal_rewards([0.0], [""], {}) is None, "one response agrees with itself"


def test_it_is_said_again_when_it_comes_back() -> None:
    watch, said = Watch(), []
    for step in range(100):
        rewards = [0.0, 1.0] if step == 3 else [0.0, 0.0]
        said += [text.split(":")[0] for text in watch.step(step, rewards, ["no", "no"], None, None, {})]
    assert said == ["step 0", "step 4", *(f"step {3 + n}, for {n} steps now" for n in (5, 10, 20, 40, 80))]


def test_pretraining_without_any_reward_says_so_before_it_trains(
    tmp_path: Path, scoring: Callable[[float], None]
) -> None:
    scoring(0.0)
    first, second, last, *_ = notes_of(tmp_path, "steps=0", *PRETRAINING)
    assert first.startswith("critic pre-training: 0 of 8 responses rewarded: base model, reward or template?")
    reason = "all returns are equal, so there is no variance to explain"
    assert second == f"critic pre-training: the held-out explained variance is no number: {reason}"
    assert last == "critic pre-trained on 8 responses: its held-out explained variance is unknown"


def test_why_an_explained_variance_is_no_number(tmp_path: Path, scoring: Callable[[float], None]) -> None:
    scoring(1.0)
    config = make_config(tmp_path, "steps=1", "logger=off", "logger.jsonl=true")
    with Records(config, tmp_path, first_step=0) as records:
        train(replace(make_run(config, ScriptedWorkers()), records=records))
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["critic/explained_variance"] is None
    (_, critic) = notes_of(tmp_path / "again", "steps=1")
    assert critic.startswith("step 0: critic/explained_variance is no number: all returns are equal")
    assert "not finite" in why_no_number(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("schedule", "loop"), [("synchronous", train), ("overlapped", train_overlapped)])
def test_evaluations_come_behind_the_steps_before_them(
    schedule: str, loop: Callable[[Run], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"schedule={schedule}", "steps=3", "evaluation.every_steps=1", "logger=off", "logger.console=plain"]
    config = make_config(tmp_path, *overrides)
    with Records(config, tmp_path, first_step=0) as records:
        loop(replace(make_run(config, ScriptedWorkers(), heldout=make_prompts(3)), records=records))
    titles = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    shown = [(title, "held-out" if first.startswith("held-out") else "train") for title, first in titles]
    evaluations = [(f"step {step}", "held-out") for step in range(4)]
    steps = [(f"step {step}", "train") for step in range(3)]
    assert shown == [evaluations[0], *(one for pair in zip(steps, evaluations[1:], strict=True) for one in pair)]
