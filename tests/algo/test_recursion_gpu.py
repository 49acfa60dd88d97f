"""The Triton kernel in Triton's interpreter; `tests/gpu/test_recursion.py` runs it on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_rl.algo import td_recursion
from tests.interpreter import in_tritons_interpreter

from .oracle import close, dense_rewards, make_batch, make_scores, random_opens, td_recursion_reference

pytest.importorskip("triton", reason="Triton is not installed, so its kernel cannot be tried")
LENGTHS = [1, 9, 4, 5, 8, 1, 12]  # with blocks of 4: shorter, equal, multiples and longer ones


def arguments(seed: int, num_responses: int, num_tokens: int) -> dict[str, Any]:
    """Optional arguments; the bits of the seed choose which."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    return {
        "gamma": draw(num_tokens) if seed & 1 else 0.9,
        "lam": draw(num_tokens if seed & 32 else num_responses) if seed & 2 else 0.7,
        "value_lam": draw(num_tokens) if seed & 32 else 0.3,
        "final_values": draw(num_responses) if seed & 4 else None,
        "action_mask": draw(num_tokens) < 0.6 if seed & 8 else None,
    }


def check(lengths: list[int], seed: int) -> None:
    batch = make_batch(lengths, seed)
    values, rewards = make_scores(batch).values, dense_rewards(batch)
    assert values is not None
    weights = dense_rewards(batch, seed).sigmoid() if seed & 16 else random_opens(batch, 0.4, seed)
    options = arguments(seed, batch.num_responses, batch.num_tokens)
    expected = td_recursion_reference(rewards, values, weights, batch.offsets, **options)
    found = td_recursion(rewards, values, weights, batch.offsets, **options)
    assert close(found[0], expected[0], 1e-10) and close(found[1], expected[1], 1e-10), seed


def test_in_the_interpreter() -> None:
    in_tritons_interpreter(interpret)


def interpret() -> None:
    from sae_rl.algo import recursion_cpu, recursion_gpu

    recursion_gpu.BLOCK_TOKENS = 4
    ran = []

    def run(*arguments: Any) -> bool:
        ran.append(arguments)
        return recursion_gpu.run(*arguments)

    recursion_cpu.run = run  # type: ignore[assignment]
    for seed in range(64):
        check(LENGTHS, seed)
    assert len(ran) == 64
