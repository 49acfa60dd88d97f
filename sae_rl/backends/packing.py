"""Distributes the responses of a batch over mini-batches, ranks and micro-batches.

The distribution must not change results. A gradient is a sum over the tokens of a mini-batch divided by their number, so
it does not depend on the rank or micro-batch of a response. Mini-batches are drawn independently of the number of ranks.

A micro-batch is one packed row: sequences of prompt and response back to back, without padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_rl.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """b sequences packed into a row of L tokens, n of them sampled. Attention must stay within each sequence."""

    rows: Tensor  # (b,) int64, indices of the responses in the batch
    input_ids: Tensor  # (1, L) int64
    position_ids: Tensor  # (1, L) int64, starting at 0 in every sequence
    lengths: tuple[int, ...]  # b lengths in tokens, which add up to L
    state_index: Tensor  # (n,) int64, position in the row whose output predicts sampled token i
    token_ids: Tensor  # (n,) int64, sampled tokens, response after response
    token_index: Tensor  # (n,) int64, index of each sampled token in the batch's flat (N,) tensors
    final_index: Tensor  # (b,) int64, position in the row of each sequence's last token
    counts: Tensor  # (b,) int64, sampled tokens of each response

    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch with its tensors on ``device``."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "lengths"}
        return replace(self, **moved)

    def attention_arguments(self) -> dict[str, Any]:
        """Keyword arguments that tell the functions of `attention` where sequences begin and end."""
        ends = torch.tensor([0, *self.lengths], device=self.input_ids.device).cumsum(0, dtype=torch.int32)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(self.lengths),
            "max_length_k": max(self.lengths),
            "sequence_lengths": self.lengths,
        }


def draw_mini_batches(num_responses: int, num_mini_batches: int, seed: int) -> list[Tensor]:
    """Splits a seeded permutation of the responses into equal mini-batches of indices."""
    order = torch.randperm(num_responses, generator=torch.Generator().manual_seed(seed))
    return list(order.chunk(num_mini_batches))


def pack(
    rows: Tensor, lengths: Tensor, max_tokens: int, num_ranks: int, attention_tokens: float = math.inf
) -> list[list[Tensor]]:
    """Packs responses into micro-batches and assigns these to ranks, so that simultaneous passes cost about the same.

    Args:
        rows: (k,) int64 indices of responses.
        lengths: (B,) prompt + response tokens of every response of the batch.
        max_tokens: limit of a micro-batch; a longer sequence gets a micro-batch of its own.
        num_ranks: ranks, which all get the same number of micro-batches.
        attention_tokens: sequence length at which attention costs as much as the rest of a pass; a sequence of T tokens
            costs ``T + T^2 / attention_tokens``.

    Returns:
        The micro-batches of each rank, (b,) indices each. Some are empty if there are too few responses.
    """
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    tokens = lengths[rows].tolist()
    num_tokens = sum(min(length, max_tokens) for length in tokens)
    num_parts = num_ranks * max(1, math.ceil(num_tokens / (max_tokens * num_ranks)))
    while (parts := _fill(tokens, num_parts, max_tokens, attention_tokens)) is None:
        num_parts += num_ranks
    # Parts come by cost, so those of a simultaneous pass cost about the same. Every other pass is reversed, so that no
    # rank always gets the costliest part.
    passes = [parts[i : i + num_ranks] for i in range(0, num_parts, num_ranks)]
    passes[1::2] = [side_by_side[::-1] for side_by_side in passes[1::2]]
    return [[rows[torch.tensor(part[rank], dtype=torch.int64)] for part in passes] for rank in range(num_ranks)]


def _fill(tokens: list[int], num_parts: int, max_tokens: int, attention_tokens: float) -> list[list[int]] | None:
    """Puts each sequence, longest first, into the cheapest part with room.

    Returns:
        The parts in descending order of cost, or None if a sequence fits in no part.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    used, costs = np.zeros(num_parts, dtype=np.int64), np.zeros(num_parts)
    for i, length in enumerate(tokens):
        has_room = (used + length <= max_tokens) | (used == 0)
        if not has_room.any():
            return None
        part = np.where(has_room, costs, np.inf).argmin()
        parts[part].append(i)
        used[part] += length
        costs[part] = costs[part] + length + length**2 / attention_tokens
    return [parts[part] for part in np.argsort(-costs, kind="stable")]


def build_micro_batch(batch: Batch, rows: Tensor) -> MicroBatch:
    """Packs the given responses, each after its prompt, into one row."""
    lengths = tuple((batch.prompt_lengths + batch.lengths)[rows].tolist())
    ends = list(accumulate(lengths))
    ids, states, tokens = [], [], []
    for row, row_end in zip(rows.tolist(), ends, strict=True):
        start, end = int(batch.offsets[row]), int(batch.offsets[row + 1])
        prompt = batch.prompt_token_ids[batch.prompt_offsets[row] : batch.prompt_offsets[row + 1]]
        ids += [prompt, batch.token_ids[start:end]]
        own = torch.arange(start, end)
        if batch.action_mask is not None:
            own = own[batch.action_mask[start:end]]
        tokens.append(own)
        states.append(own - end + row_end - 1)  # the position before each token
    token_index = torch.cat(tokens)
    return MicroBatch(
        rows=rows,
        input_ids=torch.cat(ids)[None].long(),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        lengths=lengths,
        state_index=torch.cat(states),
        token_ids=batch.token_ids[token_index].long(),
        token_index=token_index,
        final_index=torch.tensor(ends) - 1,
        counts=batch.num_sampled[rows],
    )
