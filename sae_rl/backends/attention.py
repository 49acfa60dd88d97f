"""Attention over packed rows, in which sequences lie back to back, for transformers' models on any device.

Flash attention supports packed rows. torch's scaled_dot_product_attention would need a mask over the whole row, at a cost
that grows with the square of its length. So each sequence gets a call of its own, and neighbours of equal length share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_SDPA = "sae_rl_packed_sdpa"


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: Sequence[int],
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row of L tokens.

    Args:
        query, key, value: (1, heads, L, d).
        sequence_lengths: tokens of each sequence; their sum is L.

    Returns:
        The output (1, L, heads, d), and None in place of attention weights.

    Raises:
        NotImplementedError: a sequence is longer than the model's sliding window.
    """
    if sliding_window is not None and max(sequence_lengths) > sliding_window:
        raise NotImplementedError(
            f"a sequence of {max(sequence_lengths)} tokens is longer than the model's sliding window of {sliding_window}, "
            "which model.attention=sdpa does not support in packed rows: set model.attention=flash_attention_2"
        )
    options = {name: arguments[name] for name in ("dropout", "scaling") if name in arguments}
    outputs, begin = [], 0
    for length, run in groupby(sequence_lengths):
        count = len(list(run))
        end = begin + count * length
        # (1, heads, count * length, d) -> (count, heads, length, d)
        parts = (x[0, :, begin:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        output, _ = sdpa_attention_forward(module, *parts, None, is_causal=True, **options)
        outputs.append(output.flatten(0, 1))  # (count * length, heads, d)
        begin = end
    return torch.cat(outputs)[None], None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
