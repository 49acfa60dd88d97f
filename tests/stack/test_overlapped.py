"""Sampling while others are learnt from, on the real engines: every token is of the weights that its version says."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sae_rl.commands.assemble import load_tokenizer
from sae_rl.commands.prompts import load_task
from sae_rl.records.clock import Clock
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import read_rollouts, read_step, rollout_files
from sae_rl.types import Batch, Sampling, Targets
from sae_rl.workers.session import ray_session, start_workers
from tests.stack.conftest import Configure, sampled, train_rows, trained

pytestmark = pytest.mark.alone
STEPS = 4


def test_responses_under_way_go_on_with_new_weights(configure: Configure, tmp_path: Path) -> None:
    """To 1e-4, also behind the change: keys and values are those of the new weights."""
    config = configure("algorithm=grpo", "rollout.max_response_tokens=256", "learner.policy.micro_batch_tokens=2048")
    prompts = list(load_task(config, load_tokenizer(config.model.path))[0].prompts)
    with ray_session(config), start_workers(config, prompts[:2], Clock()) as workers:
        workers.sync_weights(0)
        first = Batch.of(rollouts := sampled(workers, prompts, group_size=4, max_tokens=64), [0.0] * len(rollouts))
        workers.save(tmp_path / "before")
        draw = torch.randn(first.num_tokens, generator=torch.Generator().manual_seed(0))
        workers.update(first, workers.score(first), Targets(advantages=draw, returns=None), seed=0)

        groups = workers.rollout.open(group_size=4, sampling=Sampling(max_tokens=256))
        groups.add(prompts, "test")
        with ThreadPoolExecutor(1) as thread:
            sampling = thread.submit(lambda: [rollout for group in groups for rollout in group])
            time.sleep(0.3)
            assert workers.sync_weights(1)["sync/logprob_diff_max"] < 1e-4
            rollouts = sampling.result()
        batch = Batch.of(rollouts, [0.0] * len(rollouts))
        assert len(rollouts) == 4 * len(prompts)
        mixed = [r for r in rollouts if r.policy_versions.unique().tolist() == [0, 1]]
        assert len(mixed) > 4, "responses were under way"
        assert all(bool((r.policy_versions.diff() >= 0).all()) for r in rollouts)

        new, after = batch.policy_versions == 1, workers.score(batch).old_logprobs
        workers.load(tmp_path / "before")
        before = workers.score(batch).old_logprobs
        assert float((batch.rollout_logprobs - after)[new].abs().max()) < 1e-4
        assert float((batch.rollout_logprobs - before)[~new].abs().max()) < 1e-4
        assert float((before - after)[new].abs().max()) > 0.01, (
            "the update must be large enough for stale weights to show"
        )


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Overlapped, with partial rollouts, engines that take turns with an evaluation, and a correction."""
    output = tmp_path_factory.mktemp("runs") / "overlapped"
    more = [
        "schedule=overlapped",
        "schedule.max_staleness=2",
        "rollout.prompts_under_way=6",
        "evaluation.every_steps=2",
        "logger.rollouts_every_steps=1",
        f"steps={STEPS}",
    ]
    return trained(tiny_model, output, *more)


def test_an_overlapped_run(finished: Path) -> None:
    rows = list(train_rows(finished).values())
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert max(row["rollout/staleness_max"] for row in rows) in (1, 2)
    assert all(row["sync/logprob_diff_max"] < 1e-4 and row["ahead/overlap"] > 0 for row in rows)
    assert all(row["correction/weight_mean"] > 0 and row["rollout/num_lost_engines"] == 0 for row in rows)
    assert [row["sampling/left_over_fraction"] for row in rows] == [0, *[0.5] * (STEPS - 1)]
    asked = [read_rollouts(file)["prompt_id"].to_pylist() for _, file in rollout_files(finished)]
    assert all(len(set(names)) == 4 for names in asked)
    evaluated = [row["step"] for row in read_jsonl(finished / "metrics.jsonl") if row["phase"] == "evaluation"]
    assert evaluated == [0, 2, 4]


def test_its_recorded_rollouts_are_learnt_from_again(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The same numbers come out, without an engine."""
    more = [
        f"steps={STEPS}",
        f"replay={finished}",
        "algorithm.policy_loss.correction.mode=truncate",
        "logger.rollouts_every_steps=1",
    ]
    trained(tiny_model, tmp_path / "again", *more)
    recorded = train_rows(finished)
    for step, again in train_rows(tmp_path / "again").items():
        before = recorded[step]
        for name in ("policy/loss", "policy/approx_kl", "critic/loss", "policy/grad_norm", "critic/explained_variance",
                     "rollout/reward_mean", "segment/tokens_mean", "rollout/staleness_mean"):  # fmt: skip
            assert again[name] == pytest.approx(before[name], rel=1e-4, abs=1e-7), name
        assert "time/sync_s" not in again
    files = [rollout_files(folder)[-1][1] for folder in (finished, tmp_path / "again")]
    (rollouts, rewards, _), (copies, same_rewards, _) = read_step(files[0]), read_step(files[1])
    assert rewards == same_rewards
    for rollout, copy in zip(rollouts, copies, strict=True):
        assert rollout.prompt == copy.prompt and torch.equal(rollout.policy_versions, copy.policy_versions)
        assert torch.equal(rollout.rollout_logprobs, copy.rollout_logprobs)
