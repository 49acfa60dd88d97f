"""Model FLOPs against torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sae_rl.backends.flops import PassCost
from sae_rl.backends.models import CriticNetwork, PolicyNetwork, load_causal_lm
from sae_rl.backends.packing import build_micro_batch
from tests.backends.test_packed_models import batch, folder, model_config

__all__ = ["batch", "folder"]  # fixtures


@pytest.mark.parametrize("with_head", [True, False])
def test_a_pass_takes_what_torch_counts(folder: Path, batch: object, with_head: bool) -> None:
    """torch counts attention over all pairs of positions; causal attention needs half of them."""
    causal_lm = load_causal_lm(model_config(folder, "eager"))
    network: nn.Module = PolicyNetwork(causal_lm) if with_head else CriticNetwork.on(causal_lm)
    micro = build_micro_batch(batch, torch.tensor([2]))  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(micro, 1.0, False) if with_head else network(micro)
    cost = PassCost.of(network)
    attention = 2.0 * cost.attention_width * sum(length**2 for length in micro.lengths)
    assert 0 < attention < counter.get_total_flops()
    # torch also counts the small matrix product of rotary embeddings.
    assert cost.forward(micro.lengths, micro.token_ids.numel()) + attention == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )
