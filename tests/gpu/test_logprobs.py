"""Logprobs in chunks are those of all logits, and their memory does not grow with the tokens.

Tolerances. Both compute softmax in float32. In float32 they differ by the order of additions, 1e-5 for logits of the order
of 10. In bfloat16 each rounds the logits of a matrix product, whose tiles may differ, once: half a spacing of 2^-7 of the
number. A logprob is the difference of a logit and a mean of logits, so it is off by at most 2^-7 of the largest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.device import GIB, Device
from sae_rl.backends import logprobs
from sae_rl.backends.logprobs import OutputHead

TEMPERATURE = 0.8
SIZES = {"cuda": (3000, 1024, 151_936), "cpu": (300, 32, 1000)}  # tokens, width, words


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def inputs(request: pytest.FixtureRequest, device: Device) -> tuple[OutputHead, Tensor, Tensor]:
    count, width, words = SIZES[device.torch.type]
    torch.manual_seed(0)
    head = OutputHead(width, words, bias=False, device=device.torch, dtype=request.param)
    hidden = torch.randn(count, width, device=device.torch, dtype=request.param) * 3
    return head, hidden.requires_grad_(), torch.randint(words, (count,), device=device.torch)


def by_all_logits(head: OutputHead, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """In float32 throughout, from the same weights and states."""
    logits = hidden.float() @ head.weight.float().T / TEMPERATURE
    every = torch.log_softmax(logits, -1)
    return every.gather(1, token_ids[:, None])[:, 0], -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("with_entropies", [False, True])
def test_chunks_are_all_logits(
    inputs: tuple[OutputHead, Tensor, Tensor], with_entropies: bool, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    head, hidden, token_ids = inputs
    if not device.is_gpu:
        monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * 1000 * 70)  # five chunks, the last one shorter
    is_exact = hidden.dtype == torch.float32
    weights = torch.randn(2, len(hidden), device=device.torch)
    results: list[list[Any]] = []
    for function in (lambda: head(hidden, token_ids, TEMPERATURE, with_entropies), lambda: by_all_logits(*inputs)):
        found = function()
        loss = (found[0] * weights[0]).sum() + with_entropies * (found[1] * weights[1]).sum()
        gradients = torch.autograd.grad(loss, [hidden, head.weight])
        results.append([found[0].detach(), found[1].detach(), *(gradient.float() for gradient in gradients)])
    largest = float((hidden.float() @ head.weight.float().T).detach().abs().max()) / TEMPERATURE
    tolerance = 1e-4 if is_exact else 2.0**-7 * largest
    torch.testing.assert_close(results[0][0], results[1][0], atol=tolerance, rtol=0)
    if with_entropies:
        torch.testing.assert_close(results[0][1], results[1][1], atol=3 * tolerance, rtol=0)
    for found, expected in zip(results[0][2:], results[1][2:], strict=True):
        # In bfloat16 the gradient of each logit is rounded, 0.2 % on average, after an error of its probability.
        assert float((found - expected).norm() / expected.norm()) < (1e-4 if is_exact else 0.02)


def test_memory_does_not_grow_with_the_tokens(device: Device) -> None:
    """A chunk's three tensors, and the gradient of the weights in float32, in their type, and of one chunk."""
    if not device.is_gpu:
        pytest.skip("peak memory is that of a GPU")
    _, width, words = SIZES["cuda"]
    head = OutputHead(width, words, bias=False, device=device.torch, dtype=torch.bfloat16)
    allowed = 4 * logprobs.LOGITS_BYTES + (4 + 2 + 2 + 4) * width * words
    for count in (4096, 32_768):
        hidden = torch.randn(count, width, device=device.torch, dtype=torch.bfloat16, requires_grad=True)
        token_ids = torch.randint(words, (count,), device=device.torch)
        head.weight.grad = None

        def run(hidden: Tensor = hidden, token_ids: Tensor = token_ids) -> None:
            head(hidden, token_ids, TEMPERATURE)[0].sum().backward()

        above = device.measure(run)["above_before_gib"]
        every = 4 * count * words / GIB
        print(f"{count} tokens: {above:.2f} GiB, allowed {allowed / GIB:.2f}; all logits in float32: {every:.2f}")
        assert above * GIB < allowed + 4 * 2 * count * width
