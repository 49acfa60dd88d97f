"""Compilation of kernels for the CPU, and allocation of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

Kernel = Callable[..., Any]


def jit(**options: Any) -> Callable[[Kernel], Kernel]:
    """Decorator that compiles a function with numba: without the interpreter lock, with fused multiply-adds.

    numba caches the result on disk where it can write. ``options`` are those of ``numba.njit``.
    """
    options = {"nogil": True, "fastmath": {"contract"}} | options

    def compile_kernel(kernel: Kernel) -> Kernel:
        compiled: Kernel
        try:
            compiled = numba.njit(cache=True, **options)(kernel)
        except RuntimeError:  # numba: "cannot cache function ...: no locator available"
            compiled = numba.njit(**options)(kernel)
        return compiled

    return compile_kernel


def empty(like: Tensor, dtype: torch.dtype, skew_bytes: int = 0) -> Tensor:
    """An uninitialised tensor with the shape and device of another.

    On a CPU numpy allocates it, because numpy asks Linux for huge pages. Mapping torch's small pages takes longer than
    a recursion takes to fill them.

    Args:
        skew_bytes: a multiple of 64 by which to move the start of the memory. Large tensors of one shape otherwise lie at
            equal distances, often a power of two. A kernel that reads four of them in step then evicts the cache lines
            that it has just read (a padded recursion took 4 times as long on an AMD EPYC).
    """
    if like.is_cuda:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    skew = skew_bytes // dtype.itemsize
    memory = np.empty(like.numel() + skew, str(dtype).removeprefix("torch."))
    return torch.from_numpy(memory[skew:]).view(like.shape)
