"""Whether rollout engines have the policy's weights: exactly, by checksums, and by the logprobs of both sides.

What each check sees:

    received = sent             bytes that a transfer lost, mixed up or overwrote, for each tensor and worker process
    layers without weights      tensors that were not sent, or that vLLM did not take
    held, between engines       a load that differs between engines, for processes of the same tensor-parallel rank
    held, between syncs         a tensor that changed, whose parameter did not, or the other way round; only where vLLM
                                keeps a parameter under the tensor's name, so not for fused layers nor a CPU's linear ones
    sent, between syncs         a gather of old weights after an update
    logprobs                    another precision, temperature, or computation on one side; weights that differ a lot

No checksum sees other weights that were wrong before they were sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_rl.backends.weight_transfer import HeldWeights
from sae_rl.config.schema import RolloutConfig

NUM_NAMES = 5  # names in a message
ADVICE = "the run ends, because it would train on responses of other weights"

Checksums = Mapping[str, int]


@dataclass
class WeightCheck:
    """Compares checksums of each weight sync with those of the sync before."""

    _sent: Checksums = field(default_factory=dict)
    _held: Sequence[Checksums] = ()

    def __call__(
        self, sent: Checksums, engines: Mapping[int, Sequence[HeldWeights]], *, was_updated: bool = False
    ) -> float:
        """
        Args:
            sent: checksums of the tensors that the policy sent.
            engines: what the worker processes of each engine received and hold, by the engine's rank.
            was_updated: the policy was updated since the last call.

        Returns:
            The fraction of the sent tensors that changed since the last call; 1 in the first one.

        Raises:
            RuntimeError: an engine does not have the weights that were sent.
        """
        reference, of_reference = next(iter(engines.items()))
        for engine, workers in engines.items():
            for process, weights in enumerate(workers):
                where = f"rollout engine {engine}, process {process}"
                if different := _differences(sent, weights.received):
                    raise _error(f"{where} received other tensors than the policy sent", different)
                if weights.unloaded:
                    raise _error(f"{where} did not get all weights of some layers", weights.unloaded)
                if different := _differences(of_reference[process].held, weights.held):
                    raise _error(f"{where} holds other weights than rollout engine {reference}", different)
        held = [weights.held for weights in of_reference]
        self._compare_with_last(sent, held)
        changed = sum(self._sent.get(name) != checksum for name, checksum in sent.items()) / len(sent)
        if was_updated and not changed:
            raise _error("the policy was updated, but it sent the same weights as before", sorted(sent))
        self._sent, self._held = sent, held
        return changed

    def _compare_with_last(self, sent: Checksums, held: Sequence[Checksums]) -> None:
        if len(held) != len(self._held):
            return
        wrong = []
        for name in sent.keys() & self._sent.keys() & held[0].keys() & self._held[0].keys():
            # One rank's part of a tensor may stay as it was.
            has_changed = any(now[name] != last[name] for now, last in zip(held, self._held, strict=True))
            if has_changed != (sent[name] != self._sent[name]):
                wrong.append(name)
        if wrong:
            raise _error("rollout engines kept weights that changed, or changed weights that did not", sorted(wrong))


def _differences(expected: Checksums, found: Checksums) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _error(what: str, names: Sequence[str]) -> RuntimeError:
    more = f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else ""
    return RuntimeError(f"weight sync: {what}: {', '.join(names[:NUM_NAMES])}{more}; {ADVICE}")


@dataclass(frozen=True, slots=True)
class LogprobDifferences:
    """|log pi_rollout - log pi_theta| of sampled tokens, in nats."""

    by_engine: Mapping[int, Tensor]  # (n,) by the engine's rank

    @property
    def all(self) -> Tensor:
        return torch.cat(list(self.by_engine.values())).double()

    def metrics(self) -> dict[str, float]:
        return {
            "sync/logprob_diff_mean": float(self.all.mean()),
            "sync/logprob_diff_p99": float(self.all.quantile(0.99)),
            "sync/logprob_diff_max": float(self.all.max()),
        }

    def are_within(self, rollout: RolloutConfig) -> bool:
        """Whether mean and 99th percentile are within their tolerances; the largest of many tokens says little in bf16."""
        found = self.metrics()
        mean, p99 = found["sync/logprob_diff_mean"], found["sync/logprob_diff_p99"]
        return mean <= rollout.logprob_tolerance_mean and p99 <= rollout.logprob_tolerance_p99  # false where NaN

    def error(self, rollout: RolloutConfig, version: int) -> RuntimeError:
        found = self.metrics()
        means = {engine: float(tokens.mean()) for engine, tokens in self.by_engine.items()}
        worst = max(means, key=lambda engine: means[engine])
        return RuntimeError(
            f"after sending weights {version}, rollout engines and the policy differ on {self.all.numel()} sampled tokens "
            f"by {found['sync/logprob_diff_mean']:.4g} nats on average and {found['sync/logprob_diff_p99']:.4g} nats in "
            f"the 99th percentile; rollout.logprob_tolerance_mean = {rollout.logprob_tolerance_mean:g} and "
            f"rollout.logprob_tolerance_p99 = {rollout.logprob_tolerance_p99:g} are allowed. The mean is largest for engine "
            f"{worst}: {means[worst]:.4g}. Both sides have the same weights by their checksums, so they compute in "
            "another precision, or differently"
        )
