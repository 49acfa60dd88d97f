"""A run that samples the next responses while it learns, interrupted; and its recorded rollouts, replayed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from sae_rl import checkpoint
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import read_rollouts, read_step, step_files
from tests.stack.conftest import Killed, has_checkpoint, killed, train_rows, trained

pytestmark = pytest.mark.alone
STEPS = 4
LOSS = "algorithm/value_loss=binary_cross_entropy"


@pytest.fixture(scope="module")
def interrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Overlapped, with partial rollouts, engines that take turns with an evaluation, and a correction; then Ctrl-C."""
    output = tmp_path_factory.mktemp("runs") / "overlapped"
    more = [
        LOSS,
        "schedule=overlapped",
        "schedule.max_staleness=2",
        "rollout.prompts_under_way=6",
        "evaluation.every_steps=2",
        "logger.rollouts_every_steps=1",
        "steps=500",
        f"checkpoint.every_steps={STEPS}",
    ]
    return killed(tiny_model, output, lambda: has_checkpoint(output, STEPS), signal.SIGINT, *more)


def test_ctrl_c_ends_the_sampling_thread_and_every_process(interrupted: Killed) -> None:
    # The workers end first; then the report takes some of these seconds.
    assert not interrupted.alive and interrupted.seconds < 25, [child.cmdline()[:3] for child in interrupted.alive]
    assert interrupted.returncode == 130
    assert "the same command continues" in interrupted.stderr and "Traceback" not in interrupted.stderr
    newest = checkpoint.newest(interrupted.output / "checkpoints")
    assert newest is not None and checkpoint.read_state(newest).step % STEPS == 0


def test_an_overlapped_run(interrupted: Killed) -> None:
    rows = list(train_rows(interrupted.output).values())[:STEPS]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert max(row["rollout/staleness_max"] for row in rows) in (1, 2)
    assert all(row["sync/logprob_diff_max"] < 1e-4 and row["ahead/overlap"] > 0 for row in rows)
    assert all(row["correction/weight_mean"] > 0 and row["rollout/num_lost_engines"] == 0 for row in rows)
    assert [row["sampling/left_over_fraction"] for row in rows] == [0, *[0.5] * (STEPS - 1)]
    asked = [read_rollouts(file)["prompt_id"].to_pylist() for _, file in step_files(interrupted.output / "rollouts")]
    assert all(len(set(names)) == 4 for names in asked)
    rows = read_jsonl(interrupted.output / "metrics.jsonl")
    evaluated = [row["step"] for row in rows if row["phase"] == "evaluation"]
    assert evaluated[:3] == [0, 2, 4]


def test_its_recorded_rollouts_are_learnt_from_again(interrupted: Killed, tiny_model: Path, tmp_path: Path) -> None:
    """The same numbers come out, without an engine."""
    more = [
        f"steps={STEPS}",
        LOSS,
        f"replay={interrupted.output}",
        "algorithm.policy_loss.correction.mode=truncate",
        "logger.rollouts_every_steps=1",
    ]
    trained(tiny_model, tmp_path / "again", *more)
    recorded = train_rows(interrupted.output)
    for step, again in train_rows(tmp_path / "again").items():
        before = recorded[step]
        for name in ("policy/loss", "policy/approx_kl", "critic/loss", "critic/brier", "policy/grad_norm",
                     "critic/explained_variance", "rollout/reward_mean", "segment/tokens_mean",
                     "rollout/staleness_mean"):  # fmt: skip
            assert again[name] == pytest.approx(before[name], rel=1e-4, abs=1e-7), name
        assert "time/sync_s" not in again
    files = [step_files(folder / "rollouts")[STEPS - 1][1] for folder in (interrupted.output, tmp_path / "again")]
    (rollouts, rewards, _), (copies, same_rewards, _) = read_step(files[0]), read_step(files[1])
    assert rewards == same_rewards
    for rollout, copy in zip(rollouts, copies, strict=True):
        assert rollout.prompt == copy.prompt and torch.equal(rollout.policy_versions, copy.policy_versions)
        assert torch.equal(rollout.rollout_logprobs, copy.rollout_logprobs)
