"""What one GPU must show. Without a GPU all of these tests are skipped; docs/gpu.md says how to run them.

They import torch, Triton, numba and transformers only. Files whose tests need more skip themselves where it is missing.

``SAE_RL_GPU_TESTS_DEVICE=cpu`` runs the same code on a CPU with small sizes, for work on these tests. aten's flash attention
is then the reference of `tests/backends/flash_on_cpu.py`. It shows nothing about GPUs.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.device import Device, adapt_varlen, kernels_of
from tests.gpu.needs import KIND, NO_GPU, has_device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_device():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    """The GPU, or the CPU."""
    found = Device(KIND)
    with kernels_of(found):
        yield found


@pytest.fixture(scope="session")
def varlen(device: Device) -> None:
    """For tests that call ``varlen_attn``; skips them where torch is too old for it."""
    if missing := adapt_varlen():
        pytest.skip(missing)


@pytest.fixture(scope="session")
def rank(device: Device) -> Iterator[Any]:
    """The one rank of DeepSpeed's process group, which a process can join only once."""
    import torch.distributed as dist

    from sae_rl.backends.deepspeed import Rank, join_group

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    kind: Any = device.torch.type
    made = Rank(index=0, size=1, master_address="127.0.0.1", master_port=port, device=kind, threads=1)
    join_group(made)
    yield made
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def memory_is_free(device: Device) -> Iterator[None]:
    """Each test begins with an empty cache."""
    yield
    device.free()
