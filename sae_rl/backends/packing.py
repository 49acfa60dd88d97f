"""How the responses of a batch are dealt to mini-batches, ranks and micro-batches.

Nothing here may change a result: a gradient is a sum over the tokens of a mini-batch divided by their number, so it does
not depend on which rank or micro-batch a response lands in. Mini-batches are therefore drawn before ranks are known.

A micro-batch is one row of sequences, prompt and response each, one after the other: nothing is padded.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sae_rl.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences back to back, L tokens in all. Attention must stay within each: see `attention_arguments`."""

    rows: Tensor  # (b,) int64, indices into the batch
    input_ids: Tensor  # (1, L) int64
    position_ids: Tensor  # (1, L) int64, from 0 in every sequence
    lengths: tuple[int, ...]  # of the b sequences
    state_index: Tensor  # (n,) int64 into the L: the position whose output predicts token i
    token_ids: Tensor  # (n,) int64, the sampled tokens of the responses, row after row
    token_index: Tensor  # (n,) int64, where these tokens are in the batch's flat (N,) tensors
    final_index: Tensor  # (b,) int64 into the L: the last token of each sequence
    counts: Tensor  # (b,) int64, sampled tokens of each row

    def to(self, device: torch.device) -> MicroBatch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "lengths"}
        return replace(self, **moved)

    def attention_arguments(self) -> dict[str, Any]:
        """What flash attention, and `attention.packed_sdpa`, need to know of the sequences."""
        ends = torch.tensor([0, *self.lengths], device=self.input_ids.device).cumsum(0, dtype=torch.int32)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(self.lengths),
            "max_length_k": max(self.lengths),
            "sequence_lengths": self.lengths,
        }


def draw_mini_batches(num_responses: int, num_mini_batches: int, seed: int) -> list[Tensor]:
    """A seeded permutation of the responses, cut into equal mini-batches of indices."""
    order = torch.randperm(num_responses, generator=torch.Generator().manual_seed(seed))
    return list(order.chunk(num_mini_batches))


def pack(
    rows: Tensor, lengths: Tensor, max_tokens: int, num_ranks: int, attention_tokens: float = math.inf
) -> list[list[Tensor]]:
    """Deals rows to micro-batches and these to ranks, so that the ranks' passes cost about the same one by one.

    Args:
        rows: (k,) indices.
        lengths: (B,) prompt + response tokens of every row of the batch.
        max_tokens: of a micro-batch; a longer row gets one of its own.
        num_ranks: each gets as many micro-batches as the others.
        attention_tokens: the length at which attention costs as much as all the rest of a pass: a sequence of T tokens
            counts T + T^2 / attention_tokens.

    Returns:
        for each rank its micro-batches, (b,) indices each; some are empty where there are too few rows.
    """
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    tokens = lengths[rows].tolist()
    num_tokens = sum(min(length, max_tokens) for length in tokens)
    num_parts = num_ranks * max(1, math.ceil(num_tokens / (max_tokens * num_ranks)))
    while (parts := _fill(tokens, num_parts, max_tokens, attention_tokens)) is None:
        num_parts += num_ranks
    passes = [parts[i : i + num_ranks] for i in range(0, num_parts, num_ranks)]  # side by side those of like cost
    dealt = [one if turn % 2 == 0 else one[::-1] for turn, one in enumerate(passes)]
    return [[rows[torch.tensor(one[rank], dtype=torch.int64)] for one in dealt] for rank in range(num_ranks)]


def _fill(tokens: list[int], num_parts: int, max_tokens: int, attention_tokens: float) -> list[list[int]] | None:
    """Each sequence, longest first, to the cheapest part that has room; the parts by cost, or None if they are too few."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    room, costs = [max_tokens] * num_parts, [0.0] * num_parts
    heap = [(0.0, part) for part in range(num_parts)]
    for i, length in enumerate(tokens):
        full: list[tuple[float, int]] = []
        while heap and (parts[heap[0][1]] and room[heap[0][1]] < length):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, part = heapq.heappop(heap)
        parts[part].append(i)
        room[part] -= length
        costs[part] = cost + length + length**2 / attention_tokens
        for one in (*full, (costs[part], part)):
            heapq.heappush(heap, one)
    return [parts[part] for part in sorted(range(num_parts), key=lambda part: -costs[part])]


def build_micro_batch(batch: Batch, rows: Tensor) -> MicroBatch:
    """Lays out the given responses behind their prompts."""
    ids, positions, states, tokens, ends, lengths = [], [], [], [], [], []
    begin = 0  # of the sequence in the row
    for row in rows.tolist():
        prompt = batch.prompt_token_ids[batch.prompt_offsets[row] : batch.prompt_offsets[row + 1]]
        start, end = int(batch.offsets[row]), int(batch.offsets[row + 1])
        p, t = prompt.numel(), end - start
        ids += [prompt, batch.token_ids[start:end]]
        positions.append(torch.arange(p + t))
        own = torch.arange(t) if batch.action_mask is None else batch.action_mask[start:end].nonzero().flatten()
        states.append(begin + p - 1 + own)  # s_t is the prompt and t response tokens: its last one is at p + t - 1
        tokens.append(start + own)
        begin += p + t
        ends.append(begin - 1)
        lengths.append(p + t)
    token_index = torch.cat(tokens)
    return MicroBatch(
        rows=rows,
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        lengths=tuple(lengths),
        state_index=torch.cat(states),
        token_ids=batch.token_ids[token_index],
        token_index=token_index,
        final_index=torch.tensor(ends),
        counts=torch.tensor([own.numel() for own in tokens]),
    )
