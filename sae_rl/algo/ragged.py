"""Small operations on ragged batches: flat (N,) tensors with ``offsets`` (B+1,)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_rl.algo.jit import empty, jit
from sae_rl.types import Batch


def last_tokens(offsets: Tensor) -> Tensor:
    """(B,) index of the last token of each response."""
    assert bool((offsets.diff() > 0).all()), "a response of a batch has at least one token"
    return offsets[1:] - 1


def positions(offsets: Tensor) -> Tensor:
    """(N,) position of each token in its response, counted from 0."""
    return torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(offsets.diff())


def response_sums(flat: Tensor, lengths: Tensor) -> Tensor:
    """(B,) sums of a (N,) tensor over responses of ``lengths`` (B,) tokens, in the type of ``flat``."""
    responses = torch.arange(lengths.numel(), device=flat.device).repeat_interleave(lengths)
    return flat.new_zeros(lengths.numel()).index_add(0, responses, flat)


def sampled_tokens(flat: Tensor, batch: Batch) -> Tensor:
    """The entries of a (N,) tensor at tokens that the policy sampled."""
    return flat if batch.action_mask is None else flat[batch.action_mask]


def check_tokens(name: str, flat: Tensor, batch: Batch) -> None:
    """Raises ValueError unless ``flat`` has one finite number per response token; names the first bad response."""
    check_shape(name, flat, batch)
    check_finite(name, flat, batch.offsets)


def check_shape(name: str, flat: Tensor, batch: Batch) -> None:
    """Raises ValueError unless ``flat`` has one entry per response token, and the batch has at least one token."""
    if batch.num_tokens == 0:
        raise ValueError(f"the batch has no response tokens, so {name} cannot be computed")
    if flat.shape != (batch.num_tokens,):
        raise ValueError(f"{name} has shape {tuple(flat.shape)}, but the batch has {batch.num_tokens} response tokens")


def check_finite(name: str, flat: Tensor, offsets: Tensor) -> None:
    """Raises ValueError if a number of the (N,) tensor is not finite; names the first bad response."""
    if bool(flat.sum(dtype=torch.float32).isfinite()):
        return  # NaN and infinity would have made the sum non-finite; the sum is far cheaper than `isfinite` per number
    bad = ~flat.isfinite()
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        response = int(torch.searchsorted(offsets, token, right=True)) - 1
        position = token - int(offsets[response])
        raise ValueError(
            f"{name} is {float(flat[token])} at token {position} of response {response} "
            f"({int(bad.sum())} of {flat.numel()} tokens are not finite); check where {name} was computed"
        )


def below(name: str, flat: Tensor, limit: float, offsets: Tensor, action_mask: Tensor | None = None) -> Tensor:
    """(N,) bool, ``flat < limit``.

    Raises:
        ValueError: a number at a sampled token is not finite. Other tokens are not checked.
    """
    if flat.is_cuda or flat.dtype not in (torch.float32, torch.float64):
        is_below, is_finite = flat < limit, bool(flat.sum(dtype=torch.float32).isfinite())
    else:
        is_below = empty(flat, torch.bool)
        array = flat.contiguous().numpy()
        is_finite = bool(_below(array, array.dtype.type(limit), array.dtype.type(0), is_below.numpy()))
    if not is_finite:
        check_finite(name, flat if action_mask is None else flat.where(action_mask, 0.0), offsets)
    return is_below


@jit(fastmath={"contract", "reassoc", "nsz"})
def _below(flat: Any, limit: Any, zero: Any, is_below: Any) -> Any:
    """Compares in one pass. Returns whether all numbers are finite: 0 times NaN or infinity is NaN.

    ``zero`` is an argument because numba 0.57 to 0.60 takes the product with a literal 0 to be 0.
    """
    total = zero
    for i in range(flat.size):
        is_below[i] = flat[i] < limit
        total += flat[i] * zero
    return total == 0
