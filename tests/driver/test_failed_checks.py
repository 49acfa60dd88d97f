"""Responses whose check failed: left out of the update, or scored as the configuration says, and never silently."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from sae_rl.driver import train
from sae_rl.overlapped import train_overlapped
from sae_rl.rewards.pool import Rewards
from sae_rl.rewards.verdict import Failed, Verdict
from sae_rl.rollouts.groups import groups_of
from sae_rl.run import Run
from sae_rl.types import Batch, Rollout

from .scripted import ScriptedWorkers, make_config, make_prompts, make_rollout, make_run, outcome_of, reward_of

MOODY = make_prompts(verifier="moody")


def moody_run(folder: Path, workers: ScriptedWorkers, *overrides: str) -> Run:
    """A third of its checks fail."""
    config = make_config(folder, "rollout.prompts_per_step=5", "rollout.group_size=4", *overrides)
    return make_run(config, workers, verifier="moody")


def sampled_in(workers: ScriptedWorkers, step: int) -> list[Rollout]:
    """Everything that was sampled for one step, in the order of its prompts."""
    asked = workers.asked("generate")[step]
    prompts = {prompt.id: prompt for prompt in MOODY}
    return [make_rollout(prompts[name], i, asked.of["version"], 1.0) for name in asked.of["prompts"] for i in range(4)]


def batches_of(workers: ScriptedWorkers) -> list[Batch]:
    return [call.of["batch"] for call in workers.asked("update")]


def test_they_are_left_out_of_the_update(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    train(moody_run(tmp_path, workers, "steps=3"))
    logged = [call.of["metrics"] for call in workers.asked("log")]
    for step, batch in enumerate(batches_of(workers)):
        sampled = sampled_in(workers, step)
        kept = [r for r in sampled if isinstance(outcome_of(r), Verdict)]
        assert 0 < len(kept) < len(sampled), "some checks of this step failed, and not all"
        assert torch.equal(batch.token_ids, torch.cat([r.token_ids for r in kept]))
        assert batch.rewards.tolist() == [reward_of(r) for r in kept]
        assert logged[step]["reward/failed_fraction"] == pytest.approx(1 - len(kept) / len(sampled))
    first = workers.asked("rollouts")[0]
    record = first.of["record"]
    assert len(record.rollouts) == len(record.rewards) == len(record.reasons) == batches_of(workers)[0].num_responses


def test_they_score_as_the_rule_says(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    train(moody_run(tmp_path, workers, "steps=2", "rewards.failed=score"))
    for step, batch in enumerate(batches_of(workers)):
        sampled = sampled_in(workers, step)
        assert torch.equal(batch.token_ids, torch.cat([r.token_ids for r in sampled]))
        expected = [0.0 if isinstance(outcome_of(r), Failed) else reward_of(r) for r in sampled]
        assert batch.rewards.tolist() == expected


def test_an_estimator_that_compares_gets_no_group_of_one(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    train(moody_run(tmp_path, workers, "steps=6", "algorithm=rloo"))
    found, expected = [], []
    for step, batch in enumerate(batches_of(workers)):
        kept = Counter(r.prompt.id for r in sampled_in(workers, step) if isinstance(outcome_of(r), Verdict))
        expected += list(kept.values())
        found += torch.unique(batch.groups, return_counts=True)[1].tolist()
    assert 1 in expected, "the check of all but one response failed"
    assert sorted(found) == sorted(size for size in expected if size > 1)


def test_partial_rollouts_leave_them_out_too(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    options = ["schedule=overlapped", "schedule.max_staleness=2", "schedule.weight_updates=in_flight"]
    train_overlapped(moody_run(tmp_path, workers, "steps=3", "rollout.prompts_under_way=7", *options))
    logged = [call.of["metrics"] for call in workers.asked("log")]
    for metrics, batch in zip(logged, batches_of(workers), strict=True):
        assert batch.num_responses == round(20 * (1 - metrics["reward/failed_fraction"])) < 20


def test_critic_pretraining_leaves_them_out(tmp_path: Path) -> None:
    workers = ScriptedWorkers(qualities=[0.5] * 9)
    train(moody_run(tmp_path, workers, "steps=1", "learner.critic_pretraining.num_prompts=8"))
    sampled = sampled_in(workers, 0)
    kept = [r for r in sampled if isinstance(outcome_of(r), Verdict)]
    scored = workers.asked("score_critic")[:2]  # trained on, and held out
    assert sum(call.of["batch"].num_responses for call in scored) == len(kept) < len(sampled)
    note = next(note for note in (call.of["text"] for call in workers.asked("note")) if "pre-trained" in note)
    assert f"on {len(kept)} responses ({len(sampled) - len(kept)} left out: their checks failed)" in note


def test_groups_of(tmp_path: Path) -> None:
    rollouts = [make_rollout(prompt, i, 0, 1.0) for prompt in make_prompts(2) for i in range(2)]
    rewards = Rewards([Verdict(1.0, "right"), Failed("late"), Failed("late"), Failed("died")], failed_score=-1.0)
    first, second = groups_of(make_config(tmp_path), rollouts, rewards)
    assert (first.rollouts, first.rewards, first.reasons, second.rollouts) == (rollouts[:1], [1.0], ["right"], [])
    first, second = groups_of(make_config(tmp_path, "algorithm=grpo"), rollouts, rewards)
    assert first.rollouts == second.rollouts == []
    scored = make_config(tmp_path, "algorithm=grpo", "rewards.failed=score")
    first, second = groups_of(scored, rollouts, rewards)
    assert (first.rewards, second.rewards, second.reasons) == ([1.0, -1.0], [-1.0, -1.0], ["late", "died"])


def test_a_step_whose_checks_all_failed_ends_the_run(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    with pytest.raises(RuntimeError, match="no response is left to train on: the checks of all responses failed"):
        train(make_run(make_config(tmp_path), workers, verifier="broken"))
    assert workers.asked("update") == []
