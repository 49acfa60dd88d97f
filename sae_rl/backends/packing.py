"""How the responses of a batch are dealt to mini-batches, ranks and micro-batches.

Nothing here may change a result: a gradient is a sum over the tokens of a mini-batch divided by their number, so it does
not depend on which rank or micro-batch a response lands in. Mini-batches are therefore drawn before ranks are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_rl.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of prompt + response, right-padded. Causal attention never looks right, so no mask is needed."""

    rows: Tensor  # (b,) int64, indices into the batch
    input_ids: Tensor  # (b, L) int64
    state_index: Tensor  # (n,) int64 into the flat (b * L): the position whose output predicts token i
    token_ids: Tensor  # (n,) int64, the sampled tokens of the responses, row after row
    token_index: Tensor  # (n,) int64, where these tokens are in the batch's flat (N,) tensors
    final_index: Tensor  # (b,) int64 into the flat (b * L): the last token of each row
    last_index: Tensor  # (b,) int64 into the n tokens: the last sampled one of each row

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(**{name: getattr(self, name).to(device) for name in MicroBatch.__slots__})


def draw_mini_batches(num_responses: int, num_mini_batches: int, seed: int) -> list[Tensor]:
    """A seeded permutation of the responses, cut into equal mini-batches of indices."""
    order = torch.randperm(num_responses, generator=torch.Generator().manual_seed(seed))
    return list(order.chunk(num_mini_batches))


def deal_to_ranks(rows: Tensor, lengths: Tensor, num_ranks: int) -> list[Tensor]:
    """Deals rows to ranks so that each gets about the same number of tokens: longest first, back and forth."""
    by_length = rows[lengths[rows].argsort(descending=True, stable=True)]
    turn = torch.arange(len(by_length))
    position, lap = turn % num_ranks, turn // num_ranks
    rank = torch.where(lap % 2 == 0, position, num_ranks - 1 - position)
    return [by_length[rank == r] for r in range(num_ranks)]


def split_by_tokens(rows: Tensor, lengths: Tensor, max_tokens: int, at_least: int = 1) -> list[Tensor]:
    """Cuts rows into micro-batches of similar length, each at most ``max_tokens`` with its padding.

    Args:
        rows: (k,) indices.
        lengths: (B,) prompt + response tokens of every row of the batch.
        max_tokens: rows x longest row of one micro-batch.
        at_least: how many to make if there are rows enough, so that every rank runs the same number of passes.
    """
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    parts: list[Tensor] = []
    start = 0
    while start < len(rows):
        count = max(1, max_tokens // int(lengths[rows[start]]))
        parts.append(rows[start : start + count])
        start += count
    while len(parts) < at_least and any(len(part) > 1 for part in parts):
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[largest : largest + 1] = parts[largest].chunk(2)
    return parts


def build_micro_batch(batch: Batch, rows: Tensor) -> MicroBatch:
    """Lays out the given responses behind their prompts."""
    prompt_lengths, lengths = batch.prompt_lengths[rows], batch.lengths[rows]
    width = int((prompt_lengths + lengths).max())
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    states, tokens, ends = [], [], []
    for i, row in enumerate(rows.tolist()):
        p, t = int(prompt_lengths[i]), int(lengths[i])
        prompt_start, start = int(batch.prompt_offsets[row]), int(batch.offsets[row])
        input_ids[i, :p] = batch.prompt_token_ids[prompt_start : prompt_start + p]
        input_ids[i, p : p + t] = batch.token_ids[start : start + t]
        own = torch.arange(t) if batch.sampled is None else batch.sampled[start : start + t].nonzero().flatten()
        states.append(i * width + p - 1 + own)  # s_t is the prompt and t response tokens: its last one is at p + t - 1
        tokens.append(start + own)
        ends.append(i * width + p + t - 1)
    token_index = torch.cat(tokens)
    return MicroBatch(
        rows=rows,
        input_ids=input_ids,
        state_index=torch.cat(states),
        token_ids=batch.token_ids[token_index],
        token_index=token_index,
        final_index=torch.tensor(ends),
        last_index=batch.num_sampled[rows].cumsum(0) - 1,
    )
