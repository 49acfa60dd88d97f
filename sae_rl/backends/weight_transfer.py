"""What both sides of a weight transfer share: how tensors are cut into buckets, and checksums of what was sent and held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET_BYTES = 256 * 2**20
GOLDEN, ODD = -7046029254386353131, -4658895280553007687  # odd constants of splitmix64, as signed 64-bit integers
WORDS_AT_ONCE = {"cpu": 2**15}  # fits a core's cache
WORDS_AT_ONCE_ON_GPUS = 2**23


class TransferFailed(RuntimeError):
    """An engine failed in a weight transfer, or did not finish in time."""


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """What one of vLLM's worker processes says about its weights after a transfer."""

    received: dict[str, int]  # checksum of each tensor as it came in, before vLLM loaded it
    unloaded: tuple[str, ...]  # layers that did not get all of their weights
    held: dict[str, int]  # checksum of each parameter that the model holds; vLLM fuses and splits tensors


def buckets(sizes: Sequence[int], bucket_bytes: int) -> Iterator[range]:
    """Cuts tensors of these numbers of bytes into consecutive buckets; yields the indices of each bucket's tensors.

    A bucket ends with the tensor that takes it above the limit, as in vLLM's ``packed_nccl_broadcast_consumer``.
    """
    start, total = 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total > bucket_bytes:
            yield range(start, i + 1)
            start, total = i + 1, 0
    if start < len(sizes):
        yield range(start, len(sizes))


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes in its logical order, (number of bytes,) uint8."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def checksum(tensor: Tensor) -> Tensor:
    """A checksum of a tensor's bytes and their order, () int64 on its device.

    It is a sum of mixed 64-bit words modulo 2^64, so it is the same on every device and in every order of summation. Two
    tensors of one size that differ have the same checksum with a probability of about 2^-64.
    """
    raw = as_bytes(tensor)
    rest = raw.numel() % 8
    if rest:
        raw = torch.cat([raw, raw.new_zeros(8 - rest)])
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    at_once = WORDS_AT_ONCE.get(raw.device.type, WORDS_AT_ONCE_ON_GPUS)
    position = torch.arange(1, at_once + 1, device=raw.device).mul_(GOLDEN)
    for part in raw.view(torch.int64).split(at_once):
        mixed = part.bitwise_xor(position[: part.numel()]).mul_(ODD)
        mixed.bitwise_xor_(mixed >> 32).mul_(GOLDEN)
        total += mixed.sum()
        position += _signed(at_once * GOLDEN)
    return total


def _signed(number: int) -> int:
    """``number`` modulo 2^64, as a signed 64-bit integer."""
    return (number + 2**63) % 2**64 - 2**63


def numbers(checksums: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Checksums by name, copied from their device at once."""
    pairs = list(checksums)
    if not pairs:
        return {}
    values: list[int] = torch.stack([value for _, value in pairs]).tolist()
    return {name: value for (name, _), value in zip(pairs, values, strict=True)}
