"""A policy under adapters: the rest stays as it is, vLLM gets both merged, and the reference is the policy without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_rl.records.clock import Clock
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import read_rollouts, rollout_files
from sae_rl.types import Batch, Targets
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.session import start_learners
from tests.stack.conftest import Configure, for_learners, overrides, run
from tests.stack.test_layouts import learners_weights, rollouts_of_many_lengths

pytestmark = pytest.mark.alone
LORA = ["learner.lora.rank=4", "learner.lora.alpha=8", "learner.policy.optimizer.lr=0.05"]
KL = ["algorithm.token_rewards.kl_coef=0.05", "algorithm.policy_loss.kl_coef=0.1"]


def update(workers: RunWorkers, batch: Batch, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    advantages, returns = (torch.randn(batch.num_tokens, generator=draw) for _ in range(2))
    workers.update(batch, workers.score(batch), Targets(advantages=advantages, returns=returns), seed=seed)


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_the_reference_is_the_frozen_policy_and_adapters_are_saved(
    configure: Configure, ranks: int, stage: int
) -> None:
    config = configure(
        *LORA, *KL, *for_learners(num_workers=ranks, zero_stage=stage), "cluster.reference.num_workers=0"
    )
    batch = rollouts_of_many_lengths()
    with start_learners(config, Clock()) as workers:
        first = workers.score(batch)
        assert first.ref_logprobs is not None
        torch.testing.assert_close(first.ref_logprobs, first.old_logprobs)  # adapters begin by doing nothing
        update(workers, batch, seed=1)
        workers.save(config.output_dir)
        second = workers.score(batch)
        assert second.ref_logprobs is not None
        torch.testing.assert_close(second.ref_logprobs, first.ref_logprobs)
        assert float((second.old_logprobs - first.old_logprobs).abs().max()) > 0.01
        update(workers, batch, seed=2)
        weights = learners_weights(workers)
        workers.load(config.output_dir)
        torch.testing.assert_close(workers.score(batch).old_logprobs, second.old_logprobs)
        update(workers, batch, seed=2)
        for name, tensor in learners_weights(workers).items():
            torch.testing.assert_close(tensor, weights[name], msg=lambda m, n=name: f"{n}: {m}")
    saved = sum(file.stat().st_size for file in (config.output_dir / "policy" / "state").iterdir())
    trained_whole = sum(file.stat().st_size for file in (config.output_dir / "critic" / "state").iterdir())
    assert saved < trained_whole / 2  # what is frozen is not written again


def test_a_run_with_adapters(tied_model: Path, tmp_path: Path) -> None:
    layout = ["cluster.policy.num_workers=2", "learner.policy.zero_stage=3", "cluster.reference.num_workers=0"]
    more = ["checkpoint.every_steps=1", "logger.rollouts_every_steps=1", "learner.policy.activation_checkpointing=true"]
    output = tmp_path / "run"
    done = run("train", *overrides(tied_model, output, *LORA, *KL, *layout, *more))
    assert done.returncode == 0, done.stderr
    rows = {row["step"]: row for row in read_jsonl(output / "metrics.jsonl") if row["phase"] == "train"}
    # vLLM's logprobs of the merged weights are those of the policy with its adapters.
    assert all(row["sync/logprob_diff_max"] < 1e-4 for row in rows.values())
    assert rows[1]["policy/ref_kl"] > 1e-4

    before, after = load_file(tied_model / "model.safetensors"), load_file(output / "policy" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if "_proj" in name}
    assert changed == adapted
    for name in changed:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 4

    # The policy that scores a step's rollouts is the one that the checkpoint before it holds for transformers.
    policy = AutoModelForCausalLM.from_pretrained(output / "checkpoints" / "step_000001" / "hf")
    row = read_rollouts(dict(rollout_files(output))[1]).to_pylist()[0]
    ids = row["token_ids"]
    prompt = AutoTokenizer.from_pretrained(tied_model)(row["prompt"]).input_ids
    with torch.no_grad():
        every = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = every.gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(row["old_logprobs"]), expected, atol=1e-4, rtol=1e-4)
