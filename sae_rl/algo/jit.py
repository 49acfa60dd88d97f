"""What every kernel on the CPU needs: a compiler, and memory that is quick to map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor


def compiled(kernel: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The kernel without the interpreter lock and with fused multiply-adds, kept on disk where a folder can be written."""
    options = {"nogil": True, "fastmath": {"contract"}, **options}
    try:
        machine_code: Callable[..., Any] = numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # numba: "cannot cache function ...: no locator available"
        machine_code = numba.njit(**options)(kernel)
    return machine_code


def empty(like: Tensor, dtype: torch.dtype, skew_bytes: int = 0) -> Tensor:
    """Uninitialised memory in the shape of another tensor, on its device.

    numpy asks Linux for huge pages; the small ones of torch cost more time to map than a recursion takes to fill them.

    Args:
        skew_bytes: how far from where it would else begin, a multiple of 64. Large tensors of one shape come at equal
            distances, often a power of two; a kernel that walks through four of them in step then evicts each line that
            it has just read (a padded recursion took 4 times as long on an AMD EPYC).
    """
    if like.is_cuda:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    skew = skew_bytes // dtype.itemsize
    memory = np.empty(like.numel() + skew, str(dtype).removeprefix("torch."))
    return torch.from_numpy(memory[skew:]).view(like.shape)
