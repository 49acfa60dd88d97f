"""Gradients of a whole network as a few numbers whose inner products have the expectation of the gradients' own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 2**22  # numbers that are projected at once: temporaries take about 40 bytes for each
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # Those of splitmix64


class Projection:
    """A count sketch (Charikar, Chen and Farach-Colton, 2002): each number is added to one of D, with a random sign.

    Bucket and sign are a hash of the seed and of the number's index among all parameters, so they depend on no rank or
    device, and take no memory. Inner products of sketches of x and y have the expectation ``<x, y>`` over seeds, and a
    variance of at most ``(|x|^2 |y|^2 + <x, y>^2) / D``. With D of at least the number of parameters nothing is projected.
    """

    def __init__(self, parameters: Sequence[Tensor], dimension: int, seed: int) -> None:
        self._sizes, self._seed = [parameter.numel() for parameter in parameters], seed
        self._is_exact = dimension >= sum(self._sizes)
        self.dimension = min(dimension, sum(self._sizes))

    def __call__(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """(D,) float64 on the CPU, from one gradient for each parameter; None: it is 0."""
        projected = torch.zeros(self.dimension, dtype=torch.float64)
        first = 0
        for size, gradient in zip(self._sizes, gradients, strict=True):
            if gradient is not None:
                for start in range(0, size, PIECE):
                    piece = gradient.detach().flatten()[start : start + PIECE].double()
                    index = torch.arange(first + start, first + start + piece.numel(), device=piece.device)
                    projected += self._sum(piece, index).cpu()
            first += size
        return projected

    def _sum(self, numbers: Tensor, index: Tensor) -> Tensor:
        total = torch.zeros(self.dimension, dtype=torch.float64, device=numbers.device)
        if self._is_exact:
            return total.index_copy_(0, index, numbers)
        hashed = hash_of(index, self._seed)
        signed = torch.where(hashed & 1 == 1, numbers, -numbers)
        return total.index_add_(0, _shifted(hashed, 1) % self.dimension, signed)


def hash_of(index: Tensor, seed: int) -> Tensor:
    """64 random bits for each int64 index: splitmix64 (Steele, Lea and Flood, 2014) of the index and the seed."""
    mixed = (index + 1) * _signed(0x9E3779B97F4A7C15) + _signed(seed * 0xD1B54A32D192ED03 % 2**64)
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(multiplier)
    return mixed ^ _shifted(mixed, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """The 64 bits moved to the right, with zeros on the left, where torch repeats the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _signed(bits: int) -> int:
    """64 bits as the int64 that has them."""
    return bits - 2**64 if bits >= 2**63 else bits
