"""The fused optimizer is the plain one, and a finished phase leaves its memory to others."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.updates import Float32AdamW
from sae_rl.backends.attention import IMPLEMENTATIONS
from sae_rl.backends.models import PolicyNetwork
from sae_rl.backends.packing import build_micro_batch
from tests.gpu.models import make_batch, make_model


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_adamw_is_the_plain_one(device: Device, weight_decay: float) -> None:
    """The same formula in another order: a few units in the last place for each of 30 updates of at most ``lr``."""
    lr, results = 1e-3, []
    for options in ({"fused": True}, {"foreach": False, "fused": False}):
        torch.manual_seed(0)
        weights = [torch.randn(shape, device=device.torch, requires_grad=True) for shape in ((300, 70), (7,), (1, 1))]
        optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, **options)
        for _ in range(30):
            for weight in weights:
                weight.grad = torch.randn_like(weight) * 10.0 ** torch.randint(-6, 3, weight.shape, device=device.torch)
            optimizer.step()
        results.append(weights)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=30 * lr * 2.0**-20, rtol=30 * 2.0**-23)


def test_gradients_of_many_passes_add_up_in_float32(device: Device) -> None:
    """64 equal gradients: in bfloat16 the sum would stop growing at 256 times a summand's last bit."""
    layer = torch.nn.Linear(8, 8, bias=False, device=device.torch, dtype=torch.bfloat16)
    optimizer = Float32AdamW(layer)
    inputs = torch.full((1, 8), 1.0 + 2**-7, device=device.torch, dtype=torch.bfloat16)
    for _ in range(64):
        layer(inputs).sum().backward()
    (copy,) = optimizer._copies
    assert copy.grad is not None and bool((copy.grad == 64 * (1 + 2**-7)).all())
    assert layer.weight.grad is None
    optimizer.step()
    assert torch.equal(layer.weight, copy.bfloat16()) and not copy.grad.any()


@pytest.mark.usefixtures("varlen")
def test_a_finished_phase_leaves_its_memory(device: Device) -> None:
    """What torch keeps for later goes back; only weights and gradients stay."""
    batch = make_batch(device)
    policy = PolicyNetwork(make_model(device, IMPLEMENTATIONS["varlen"], torch.bfloat16)).train()
    micro = build_micro_batch(batch, torch.arange(batch.num_responses)).to(device.torch)
    policy(micro, batch.temperature, False)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    if not device.is_gpu:
        pytest.skip("reserved memory is that of a GPU")
    torch.cuda.synchronize()
    at_work = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    reserved, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    held = sum(2 * p.numel() * p.element_size() for p in policy.parameters())
    print(f"reserved {at_work / 2**20:.0f} MiB at work, {reserved / 2**20:.0f} after it; used {used / 2**20:.0f}")
    assert reserved < at_work / 2 and used < 1.2 * held + 2**27
    # torch returns whole segments of 2 or 20 MiB and more, so a tenth may stay as fragments.
    assert reserved < 1.1 * used + 2**28
