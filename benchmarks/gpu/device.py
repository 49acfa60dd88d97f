"""The device that figures are measured on: its time, its memory, and what its torch can do."""

from __future__ import annotations

import contextlib
import gc
import inspect
import platform
import time
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Program = Callable[[], Any]

GIB = 2**30
BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, by NVIDIA's datasheets for the SXM parts
PRETENDED_BYTES = 2 * GIB  # of a CPU, which is for development of the benchmark only


class Device:
    """A GPU, or a CPU for the development of tests and benchmarks."""

    def __init__(self, kind: str) -> None:
        self.torch = torch.device(kind)
        self.is_gpu = kind == "cuda"

    @property
    def bytes(self) -> int:
        """Its memory."""
        return torch.cuda.get_device_properties(0).total_memory if self.is_gpu else PRETENDED_BYTES

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Returns all memory that nothing refers to."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def timed(self, program: Program) -> Program:
        """The same program, which returns when the device has finished."""

        def run() -> None:
            program()
            self.wait()

        return run

    def measure(self, program: Program) -> dict[str, float]:
        """Seconds of one run, the peak memory meanwhile, and how far the peak is above the memory before."""
        self.wait()
        before = torch.cuda.memory_allocated() if self.is_gpu else 0
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        program()
        self.wait()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if self.is_gpu else 0
        return {"s": seconds, "peak_gib": peak / GIB, "above_before_gib": (peak - before) / GIB}

    def facts(self) -> dict[str, Any]:
        """Names and versions of everything that a figure may depend on."""
        found: dict[str, Any] = {"python": platform.python_version(), "device": self.torch.type}
        for package in ("torch", "triton", "transformers", "numba", "deepspeed", "vllm"):
            with contextlib.suppress(PackageNotFoundError):
                found[package] = version(package)
        if self.is_gpu:
            found |= {
                "name": torch.cuda.get_device_name(0),
                "capability": torch.cuda.get_device_capability(0),
                "memory_gib": self.bytes / GIB,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
        return found

    def datasheet_flops(self) -> float | None:
        """Dense bfloat16 FLOPs per second by the vendor's datasheet; None for a device that `BF16_FLOPS` lacks."""
        name = torch.cuda.get_device_name(0) if self.is_gpu else ""
        return next((flops for part, flops in BF16_FLOPS.items() if part in name), None)


def adapt_varlen() -> str | None:
    """Lets `sae_rl.backends.attention` call the ``varlen_attn`` of torch 2.11, which has no ``enable_gqa``.

    The kernel itself takes fewer heads of keys than of queries; torch 2.13 only asks the caller to say so.

    Returns:
        Why this torch cannot run it, or None.
    """
    from sae_rl.backends import attention

    original = attention.varlen_attn
    known = inspect.signature(original).parameters
    if missing := {"scale", "window_size"} - known.keys():
        names = " or ".join(sorted(missing))
        return f"varlen_attn of torch {torch.__version__} has no {names}: torch 2.11 or newer is needed"
    if "enable_gqa" in known:
        return None

    @wraps(original)
    def without_the_option(*tensors: Any, enable_gqa: bool, **options: Any) -> Any:
        return original(*tensors, **options)

    attention.varlen_attn = without_the_option
    return None


@contextlib.contextmanager
def kernels_of(device: Device) -> Iterator[None]:
    """On a CPU, aten's flash attention is computed by the reference of the tests."""
    if device.is_gpu:
        yield
        return
    from tests.backends.flash_on_cpu import flash_on_cpu

    with flash_on_cpu():
        yield
