"""Under all ranks, ZeRO stages, token budgets and sequence parallelism, an update equals a padded model's to 1e-5."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification

from sae_rl.types import Batch
from sae_rl.workers.run_workers import RunWorkers
from tests.exactness import Exactness, largest_difference
from tests.stack.conftest import Configure, for_learners
from tests.stack.learners.conftest import Learners, learners_weights, rollouts_of_many_lengths
from tests.stack.learners.padded import ENTROPY_COEF, VALUE_CLIP, Expected, expected_of

pytestmark = pytest.mark.alone


def set_budget(worker: object, tokens: int) -> None:
    """Runs inside every rank."""
    learner = worker._learner  # type: ignore[attr-defined]
    learner.config = learner.config.model_copy(update={"micro_batch_tokens": tokens})


@pytest.fixture(scope="module")
def critic_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A critic with other weights than the policy, and with a head that is not zero."""
    folder = tmp_path_factory.mktemp("critic") / "critic"
    torch.manual_seed(3)
    critic = AutoModelForTokenClassification.from_pretrained(tiny_model, num_labels=1)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    critic.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny_model: Path, critic_folder: Path) -> Expected:
    return expected_of(tiny_model, critic_folder, rollouts_of_many_lengths())


@pytest.fixture(scope="module")
def expected_of_one(tiny_model: Path, critic_folder: Path) -> Expected:
    return expected_of(tiny_model, critic_folder, rollouts_of_many_lengths(1))


def differences(workers: RunWorkers, batch: Batch, expected: Expected) -> dict[str, float]:
    """The largest differences of scores, and of the gradients of one update."""
    scores = workers.score(batch)
    assert scores.entropies is not None and scores.values is not None
    metrics, _ = workers.update(batch, expected.given, expected.targets, seed=0)
    for name, value in expected.metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    after = learners_weights(workers)
    assert after.keys() == expected.weights.keys()
    found = {name: expected.weights[name] - after[name] for name in after}
    gaps = {name: largest_difference(found[name], expected.gradients[name]) for name in found}
    return {
        "logprobs": largest_difference(scores.old_logprobs, expected.logprobs),
        "entropies": largest_difference(scores.entropies, expected.entropies),
        "values": largest_difference(scores.values, expected.values),
        **{
            f"{role} gradient": max(gap for n, gap in gaps.items() if n.startswith(role))
            for role in ("policy", "critic")
        },
    }


def without_a_scoring_pass(workers: RunWorkers, saved: Path, batch: Batch, expected: Expected) -> None:
    """A single update takes log pi_old from its own pass: its result is the same, and it returns them."""
    weights = []
    for old_logprobs in (expected.logprobs, None):
        workers.load(saved)
        scores = replace(expected.given, old_logprobs=old_logprobs)
        metrics, logprobs = workers.update(batch, scores, expected.targets, seed=0)
        assert metrics["policy/clip_fraction"] == 0 and metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert largest_difference(logprobs, expected.logprobs) < 1e-5
        weights.append(learners_weights(workers))
    assert max(largest_difference(weights[0][name], weights[1][name]) for name in weights[0]) < 1e-5


def sizes(expected: Expected) -> dict[str, float]:
    """The largest numbers themselves, to compare the differences with."""
    largest = {name: float(gradient.abs().max()) for name, gradient in expected.gradients.items()}
    flat = {"logprobs": expected.logprobs, "entropies": expected.entropies, "values": expected.values}
    return {name: float(numbers.abs().max()) for name, numbers in flat.items()} | {
        f"{role} gradient": max(size for n, size in largest.items() if n.startswith(role))
        for role in ("policy", "critic")
    }


@dataclass(frozen=True)
class Layout:
    """How policy and critic are spread over processes."""

    ranks: int
    stage: int
    sharing: int = 1
    recomputed: bool = False
    offloaded: bool = False

    def __str__(self) -> str:
        parts = [f"{self.ranks} rank{'s' * (self.ranks > 1)}", f"ZeRO {self.stage}"]
        parts += ["both share rows"] if self.sharing > 1 else []
        parts += ["activations recomputed"] if self.recomputed else []
        return ", ".join([*parts, "offloaded"] if self.offloaded else parts)

    def overrides(self, critic_folder: Path) -> list[str]:
        """The first step of Adam with a huge epsilon and the inverse learning rate is the gradient itself."""
        as_it_is = {"optimizer__lr": 1e6, "optimizer__eps": 1e6, "optimizer__max_grad_norm": 1e6}
        keys = {
            "num_workers": self.ranks,
            "zero_stage": self.stage,
            "activation_checkpointing": self.recomputed,
            "offload_optimizer": self.offloaded,
            "offload_parameters": self.offloaded and self.stage == 3,
            "num_mini_batches": 1,
            "num_epochs": 1,
        }
        return [
            *for_learners(**keys, **as_it_is),
            f"learner.sequence_parallel_size={self.sharing}",
            f"learner.critic_pretraining.checkpoint={critic_folder}",
            f"algorithm.policy_loss.entropy_coef={ENTROPY_COEF}",
            f"algorithm.value_loss.value_clip={VALUE_CLIP}",
            "algorithm/segmenter=entropy",  # so that the policy scores a batch although there is one update
        ]


# Every two of these meet in a layout: gradients clipped by us (ZeRO 0), by DeepSpeed's optimizer of ZeRO 1 and 2, or by that
# of ZeRO 3; ranks with rows of their own, or that share rows; activations kept or recomputed; states here or offloaded.
# What stays out: ZeRO 0 has nothing to offload, and sharing rows under ZeRO 1 and 2 is that under ZeRO 0.
LAYOUTS = [
    Layout(1, 0),  # nothing is exchanged
    Layout(2, 0, recomputed=True),  # all-reduced gradients
    Layout(2, 1, recomputed=True),  # sharded optimizer states
    Layout(2, 2, offloaded=True),  # sharded gradients, and optimizer states on the host
    Layout(2, 3),  # sharded parameters
    Layout(2, 0, sharing=2),  # rows exchanged within attention
    Layout(2, 3, sharing=2, recomputed=True, offloaded=True),  # parameters on the host too, and all of it together
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_is_the_padded_update(
    configure: Configure,
    learners: Learners,
    expected: Expected,
    expected_of_one: Expected,
    critic_folder: Path,
    exactness: Exactness,
    layout: Layout,
) -> None:
    config = configure(*layout.overrides(critic_folder))
    batch, table = rollouts_of_many_lengths(), "Ranks, ZeRO stages and budgets"
    exactness.record(table, "(the largest number itself)", sizes(expected))
    workers = learners(config)
    workers.save(config.output_dir)
    for budget in (64, 4096):
        for role in ("policy", "critic"):
            workers._groups[role].run(lambda worker, b=budget: worker.__ray_call__.remote(set_budget, b))  # type: ignore
        workers.load(config.output_dir)
        found = differences(workers, batch, expected)
        exactness.record(table, f"{layout}, {budget} tokens a pass", found)
        assert all(gap < 1e-5 for gap in found.values()), found
    without_a_scoring_pass(workers, config.output_dir, batch, expected)
    # With one response, all ranks but one run it without counting it.
    workers.load(config.output_dir)
    found = differences(workers, rollouts_of_many_lengths(1), expected_of_one)
    assert all(gap < 1e-5 for gap in found.values()), found


def test_bfloat16_is_near_the_padded_update(
    configure: Configure, learners: Learners, expected: Expected, critic_folder: Path
) -> None:
    """The recipes for GPUs train in bfloat16. It has eight bits, and the gradient is a sum over 200 tokens."""
    config = configure(*Layout(2, 3, recomputed=True).overrides(critic_folder), "model.precision=bfloat16")
    batch = rollouts_of_many_lengths()
    workers = learners(config)
    scores = workers.score(batch)
    torch.testing.assert_close(scores.old_logprobs, expected.logprobs, atol=0.3, rtol=0.05)
    metrics, _ = workers.update(batch, expected.given, expected.targets, seed=0)
    for name in ("policy/grad_norm", "critic/grad_norm", "critic/loss"):
        assert metrics[name] == pytest.approx(expected.metrics[name], rel=0.1), name
