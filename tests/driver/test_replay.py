"""Learning from recorded rollouts: the steps that are there, in their order, with the seeds that they had."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from sae_rl.records.rollouts import write_rollouts
from sae_rl.replay import train_replay
from sae_rl.seeds import derive_seed
from sae_rl.settings import ConfigError
from sae_rl.types import Batch, Scores, StepRecord, Targets
from tests.records.sample_run import sample_step

from .scripted import ScriptedWorkers, make_config, make_run

RECORDED = [0, 5]


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, list[Batch]]:
    folder, batches = tmp_path / "recorded", []
    for step in RECORDED:
        rollouts, rewards = sample_step(step, num_prompts=2, skill=0.5, rng=random.Random(step))
        batch = Batch.of(rollouts, rewards)
        flat = torch.zeros(batch.num_tokens)
        record = StepRecord(
            step=step,
            rollouts=rollouts,
            rewards=rewards,
            reasons=[""] * len(rollouts),
            opens=flat.bool(),
            scores=Scores(old_logprobs=flat, values=None, ref_logprobs=None),
            targets=Targets(advantages=flat, returns=None),
        )
        write_rollouts(folder, record)
        batches.append(batch)
    return folder, batches


def test_recorded_steps_are_learnt_from(tmp_path: Path, recorded: tuple[Path, list[Batch]]) -> None:
    folder, batches = recorded
    workers = ScriptedWorkers()
    train_replay(make_run(make_config(tmp_path / "again", "steps=2", f"replay={folder}"), workers))
    assert not workers.asked("generate", "sync"), "there is no engine"
    for updated, batch, step in zip(workers.asked("update"), batches, RECORDED, strict=True):
        assert updated.of["seed"] == derive_seed(100, "update", step)
        for name in (
            "token_ids",
            "offsets",
            "prompt_token_ids",
            "rollout_logprobs",
            "policy_versions",
            "rewards",
            "groups",
        ):
            assert torch.equal(getattr(updated.of["batch"], name), getattr(batch, name)), name
    logged = [call.of for call in workers.asked("log")]
    assert [of["step"] for of in logged] == [0, 1]
    assert [of["metrics"]["rollout/staleness_max"] for of in logged] == [0, 0], "of the step that was recorded"


def test_what_cannot_be_replayed_is_said(tmp_path: Path, recorded: tuple[Path, list[Batch]]) -> None:
    folder, _ = recorded
    run = make_run(make_config(tmp_path / "again", "steps=3", f"replay={folder}"), ScriptedWorkers())
    with pytest.raises(ConfigError, match=r"2 steps are recorded in .*rollouts, but steps = 3"):
        train_replay(run)
    with pytest.raises(ConfigError, match=r"replay = output_dir = .*: a run records anew"):
        make_config(folder, "steps=2", f"replay={folder}")
    with pytest.raises(ConfigError, match="recorded rollouts need no sampling"):
        make_config(tmp_path / "again", f"replay={folder}", "schedule=overlapped")
    (folder / "rollouts" / "step_000005.parquet").write_text("no parquet")
    run = make_run(make_config(tmp_path / "again", "steps=2", f"replay={folder}"), ScriptedWorkers())
    with pytest.raises(ValueError, match=r"step_000005.parquet holds no rollouts that can be read"):
        train_replay(run)
