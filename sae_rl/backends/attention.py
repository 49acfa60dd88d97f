"""Attention over packed rows, in which sequences lie back to back, for transformers' models on any device.

`packed_varlen` calls torch's variable-length flash attention once for a row; it needs a GPU and 16-bit numbers.
`packed_sdpa` runs everywhere. torch's scaled_dot_product_attention would need a mask over the whole row, at a cost that grows
with the square of its length, so each sequence gets a call of its own, and neighbours of equal length share one. The cuDNN
backend, which torch prefers on newer GPUs, plans for each of these shapes anew.

A sequence may begin with tokens that stand elsewhere in the row: its prompt, which an earlier response has too. Their keys
and values are copied to each such sequence, and its queries are those of its own tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

IMPLEMENTATIONS = {  # model.attention -> the name that transformers knows
    "auto": "sae_rl_packed",
    "varlen": "sae_rl_packed_varlen",
    "sdpa": "sae_rl_packed_sdpa",
    "eager": "eager",  # transformers' own, with a mask over the row
}
VARLEN_TYPES = (torch.bfloat16, torch.float16)
# Names of layers that pass on a state from token to token, also in models whose configuration does not list its layers
WITH_STATE = re.compile("Mamba|SSM|Conv1d|RWKV|Recurrent|DeltaNet|LinearAttention")
NOT_COMPUTED = {"softcap": "a cap on its scores", "s_aux": "sinks", "position_bias": "a bias of positions"}
BLOCK = 128  # queries to a call with a mask, which skips no key that one of them sees


def shares_prompts(network: nn.Module) -> bool:
    """Whether functions of this module are all that connects tokens, so that responses can share their prompt's."""
    if any(WITH_STATE.search(type(module).__name__) for module in network.modules()):
        return False
    configs = [module.config for module in network.modules() if isinstance(module, PreTrainedModel)]
    types = {kind for config in configs for kind in config.to_dict().get("layer_types") or ()}
    packed = {name for name in IMPLEMENTATIONS.values() if name != "eager"}
    return types <= {"full_attention", "sliding_attention"} and packed >= {c._attn_implementation for c in configs}


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
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    key_index: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row of L tokens, in one call of the kernel.

    Args:
        query, key, value: (1, heads, L, d) in a 16-bit type; key and value may have fewer heads, which divide the query's.
        cu_seq_lens_q: (sequences + 1,) int32, where the own tokens of sequences begin and end in the row.
        max_length_q: the most own tokens of a sequence.
        cu_seq_lens_k, max_length_k: the same with the tokens that stand elsewhere; None: there are none.
        key_index: (K,) int64 position in the row of each token of the sequences, back to back; None: the row itself.
        sliding_window: keys that a token sees, itself included; None: all before it.

    Returns:
        The output (1, L, heads, d), and None in place of attention weights.

    Raises:
        NotImplementedError: the model has dropout in its attention, or another part that the kernel does not compute.
    """
    _check_computed(arguments)
    if dropout:
        raise NotImplementedError(
            f"the model's attention_dropout = {dropout:g}, but model.attention = varlen has no dropout: use sdpa"
        )
    # The kernel counts the keys before a token, without the token itself.
    max_k, cu_k = max_length_k or max_length_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    window = (-1, 0) if sliding_window is None or sliding_window >= max_k else (sliding_window - 1, 0)
    rows = _rows(query, key, value, key_index)
    # With fewer queries than keys, the kernel takes them for the last of the sequence.
    bounds = (cu_seq_lens_q, cu_k, max_length_q, max_k)
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
    query_lengths: Sequence[int] | None = None,
    key_index: Tensor | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row of L tokens, with a call for each run of equal lengths.

    Args:
        query, key, value: (1, heads, L, d); key and value may have fewer heads, which divide the query's.
        sequence_lengths: tokens of each sequence.
        query_lengths: own tokens of each sequence, its last ones; their sum is L. None: all of them.
        key_index: as for `packed_varlen`.
        sliding_window: keys that a token sees, itself included; None: all before it.

    Returns:
        The output (1, L, heads, d), and None in place of attention weights.

    Raises:
        NotImplementedError: the model's attention has a part that is not computed here.
    """
    _check_computed(arguments)
    options = {name: arguments[name] for name in ("dropout", "scaling") if name in arguments}
    shapes = list(zip(query_lengths or sequence_lengths, sequence_lengths, strict=True))
    runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]
    # `split` joins its gradients in one copy; slices would each add theirs to a row of zeros.
    queries, keys, values = _rows(query, key, value, key_index)
    query_spans = queries.split([own * count for (own, _), count in runs])
    spans = [x.split([length * count for (_, length), count in runs]) for x in (keys, values)]
    outputs = []
    for (_, count), *parts in zip(runs, query_spans, *spans, strict=True):
        # (count * length, heads, d) -> (count, heads, length, d)
        batched = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in parts)
        outputs.append(_causal(module, *batched, sliding_window, options).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _check_computed(arguments: dict[str, Any]) -> None:
    """Raises NotImplementedError if a model passes something that transformers' own SDPA would ignore in silence."""
    for name, what in NOT_COMPUTED.items():
        if arguments.get(name) is not None:
            raise NotImplementedError(f"the model's attention has {what}: set model.attention=eager")


def _rows(query: Tensor, key: Tensor, value: Tensor, key_index: Tensor | None) -> list[Tensor]:
    """(1, heads, L, d) -> (L, heads, d), and (K, heads, d) for key and value."""
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    return rows if key_index is None else [rows[0], *(x.index_select(0, key_index) for x in rows[1:])]


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict[str, Any]
) -> Tensor:
    """(n, heads, q, d) queries of the last q of k tokens, and their keys and values -> (n, q, heads, d)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys and (window is None or num_keys <= window):
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **options)[0]
    # Repeated once: blocks see parts of one copy, where a call for each would keep one of its own until the backward pass.
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    named = {"dropout": "dropout_p", "scaling": "scale"}  # transformers' names and torch's
    of_torch = {named[name]: value for name, value in options.items()}
    outputs = []
    for first in range(num_keys - num_queries, num_keys, BLOCK):  # the block's first token
        last = min(first + BLOCK, num_keys)
        begin = 0 if window is None else max(0, first + 1 - window)
        mask = torch.ones(last - first, last - begin, dtype=torch.bool, device=query.device).tril(first - begin)
        if window is not None:
            mask = mask.triu(first - begin + 1 - window)
        block = query[:, :, first - num_keys : last - num_keys or None]
        seen = (x[:, :, begin:last] for x in (key, value))
        output = functional.scaled_dot_product_attention(block, *seen, attn_mask=mask, **of_torch)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1)


AttentionInterface.register(IMPLEMENTATIONS["auto"], packed_attention)
AttentionInterface.register(IMPLEMENTATIONS["varlen"], packed_varlen)
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], packed_sdpa)
