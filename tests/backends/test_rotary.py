"""Rotary frequencies that DeepSpeed rounded are computed anew, for models with one table and with one per layer type."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from sae_rl.backends.models import _restore_rotary_frequencies


@pytest.mark.parametrize(
    "exact", [Qwen3RotaryEmbedding(Qwen3Config()), Gemma3RotaryEmbedding(Gemma3TextConfig())], ids=["one", "two"]
)
def test_rounded_frequencies_become_exact(exact: nn.Module) -> None:
    expected = {name: table.clone() for name, table in exact.named_buffers() if name.endswith("inv_freq")}
    rounded = exact.to(torch.bfloat16)
    _restore_rotary_frequencies(nn.Sequential(rounded))
    found = dict(rounded.named_buffers())
    assert expected
    for name, table in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], table), name
