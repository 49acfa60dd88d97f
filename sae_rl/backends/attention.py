"""Attention over sequences that lie back to back in one row, for transformers' models on any device.

Flash attention knows such rows; torch's scaled_dot_product_attention would need a mask over the whole row, whose cost grows
with the square of all its tokens. Here each sequence is a call of its own, and those of one length are a call together.
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
    """Causal attention within each sequence.

    Args:
        query, key, value: (1, heads, L, d).
        sequence_lengths: they add up to L.

    Returns:
        (1, L, heads, d), and no weights.

    Raises:
        NotImplementedError: a sequence is longer than the model's sliding window.
    """
    if sliding_window is not None and max(sequence_lengths) > sliding_window:
        raise NotImplementedError(
            f"a sequence of {max(sequence_lengths)} tokens is longer than the model's sliding window of {sliding_window}, "
            "which model.attention=sdpa does not know in packed rows: set model.attention=flash_attention_2"
        )
    parts, begin = [], 0
    for length, run in groupby(sequence_lengths):
        count = len(list(run))
        end = begin + count * length
        # (1, heads, count * length, d) -> (count, heads, length, d)
        pieces = (x[0, :, begin:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        found, _ = sdpa_attention_forward(module, *pieces, None, is_causal=True, **_known(arguments))
        parts.append(found.flatten(0, 1))  # (count * length, heads, d)
        begin = end
    return torch.cat(parts)[None], None


def _known(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ("dropout", "scaling") if name in arguments}


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
