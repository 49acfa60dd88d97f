"""Attention over packed rows, in which sequences lie back to back, for transformers' models on any device.

`packed_varlen` calls torch's variable-length flash attention once for a row; it needs a GPU and 16-bit numbers.
`packed_sdpa` runs everywhere. torch's scaled_dot_product_attention would need a mask over the whole row, at a cost that grows
with the square of its length, so each sequence gets a call of its own, and neighbours of equal length share one. The cuDNN
backend, which torch prefers on newer GPUs, plans for each of these shapes anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATIONS = {  # model.attention -> the name that transformers knows
    "auto": "sae_rl_packed",
    "varlen": "sae_rl_packed_varlen",
    "sdpa": "sae_rl_packed_sdpa",
    "eager": "eager",  # transformers' own, with a mask over the row
}
VARLEN_TYPES = (torch.bfloat16, torch.float16)


def packed_attention(
    module: nn.Module, query: Tensor, *tensors: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """`packed_varlen` for 16-bit numbers on a GPU, otherwise `packed_sdpa`; arguments and result are theirs."""
    attend = packed_varlen if query.is_cuda and query.dtype in VARLEN_TYPES else packed_sdpa
    return attend(module, query, *tensors, **arguments)  # type: ignore[arg-type]


def packed_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row of L tokens, in one call of the kernel.

    Args:
        query, key, value: (1, heads, L, d) in a 16-bit type; key and value may have fewer heads, which divide the query's.
        cu_seq_lens_q: (sequences + 1,) int32, where sequences begin and end in the row.
        max_length_q: tokens of the longest sequence.
        sliding_window: keys that a token sees, itself included; None: all before it.

    Returns:
        The output (1, L, heads, d), and None in place of attention weights.

    Raises:
        NotImplementedError: the model has dropout in its attention.
    """
    if dropout:
        raise NotImplementedError(
            f"the model's attention_dropout = {dropout:g}, but model.attention = varlen has no dropout: use sdpa"
        )
    # The kernel counts the keys before a token, without the token itself.
    window = (-1, 0) if sliding_window is None or sliding_window >= max_length_q else (sliding_window - 1, 0)
    rows = (x[0].transpose(0, 1) for x in (query, key, value))  # (1, heads, L, d) -> (L, heads, d)
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    output = varlen_attn(*rows, *bounds, scale=scaling, window_size=window, enable_gqa=True)
    assert isinstance(output, Tensor), "return_aux asks for more, and is None"
    return output[None], None


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
    """Causal attention within each sequence of a packed row of L tokens, with a call for each run of equal lengths.

    Args:
        query, key, value: (1, heads, L, d); key and value may have fewer heads, which divide the query's.
        sequence_lengths: tokens of each sequence; their sum is L.
        sliding_window: keys that a token sees, itself included; None: all before it.

    Returns:
        The output (1, L, heads, d), and None in place of attention weights.
    """
    options = {name: arguments[name] for name in ("dropout", "scaling") if name in arguments}
    runs = [(length, len(list(run))) for length, run in groupby(sequence_lengths)]
    # `split` joins its gradients in one copy; slices would each add theirs to a row of zeros.
    spans = [x.squeeze(0).split([length * count for length, count in runs], dim=1) for x in (query, key, value)]
    outputs = []
    for (length, count), *parts in zip(runs, *spans, strict=True):
        mask = None
        if sliding_window is not None and length > sliding_window:
            whole = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = whole.tril().triu(1 - sliding_window)
        # (heads, count * length, d) -> (count, heads, length, d)
        batched = (x.unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        output, _ = sdpa_attention_forward(module, *batched, mask, is_causal=True, **options)
        outputs.append(output.flatten(0, 1))  # (count * length, heads, d)
    return torch.cat(outputs)[None], None


AttentionInterface.register(IMPLEMENTATIONS["auto"], packed_attention)
AttentionInterface.register(IMPLEMENTATIONS["varlen"], packed_varlen)
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], packed_sdpa)
