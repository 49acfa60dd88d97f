"""Figures of single operations: the recursion, attention over packed rows, and logprobs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.advantage import LAM, loop_in_the_form_of_openrlhf, loop_in_the_form_of_verl, make
from benchmarks.gpu.device import Device, Program
from benchmarks.gpu.sizes import Sizes
from benchmarks.turns import take_turns
from sae_rl.algo import td_recursion
from sae_rl.backends.attention import packed_sdpa, packed_varlen
from sae_rl.backends.logprobs import OutputHead

SLOW_S = 2.0  # a program that takes longer runs once
MATRIX = 8192
KNOWN = {"gamma": 1.0, "lam": LAM, "value_lam": 1.0}


def best(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: min(runs) for name, runs in seconds.items()}


def matrix_rate(device: Device) -> float:
    """FLOPs per second of a product of two random bfloat16 matrices."""
    size = MATRIX if device.is_gpu else 64
    a, b = (torch.randn(size, size, device=device.torch, dtype=torch.bfloat16) for _ in range(2))
    seconds = take_turns({"product": device.timed(lambda: a @ b)}, 10)
    return 2 * size**3 / best(seconds)["product"]


def recursion(device: Device, sizes: Sizes) -> list[dict[str, Any]]:
    """Advantages and critic targets: the kernel, the same on the CPU, and the padded loops of other trainers."""
    found = []
    for shape in sizes.recursion:
        work = make(*(int(number) for number in shape.split("x")))
        flat = (work.rewards, work.values, work.opens, work.offsets)
        on_device = [tensor.to(device.torch) for tensor in flat]
        rewards, values, mask = (x.to(device.torch) for x in (work.padded(flat[0]), work.padded(flat[1]), work.mask))
        programs: dict[str, Program] = {
            "sae_rl": lambda on_device=on_device: td_recursion(*on_device, **KNOWN),
            "sae_rl, CPU": lambda flat=flat: td_recursion(*flat, **KNOWN),
            "verl's form": lambda: loop_in_the_form_of_verl(rewards, values, mask, LAM),  # noqa: B023
            "OpenRLHF's form": lambda: loop_in_the_form_of_openrlhf(rewards, values, mask, LAM),  # noqa: B023
        }
        timed = {name: device.timed(program) for name, program in programs.items()}
        found.append(
            {"shape": shape, "tokens": work.values.numel(), "s": best(take_turns(timed, sizes.rounds, SLOW_S))}
        )
    return found


def mixes(row_tokens: int) -> dict[str, list[int]]:
    """Lengths of the sequences of one row, by the name of the mix."""
    rng = np.random.default_rng(0)
    mixed = rng.lognormal(math.log(row_tokens / 12), 0.8, 100).astype(int).clip(1, row_tokens // 2)
    short = rng.integers(row_tokens // 200 + 1, row_tokens // 20 + 2, 100)
    return {
        "one sequence": [row_tokens],
        "equal lengths": [row_tokens // 16] * 16,
        "lognormal": _filling(mixed.tolist(), row_tokens),
        "short, all different": _filling(short.tolist(), row_tokens),
    }


def _filling(lengths: list[int], row_tokens: int) -> list[int]:
    return [length for i, length in enumerate(lengths) if sum(lengths[: i + 1]) <= row_tokens]


def attention(device: Device, sizes: Sizes) -> list[dict[str, Any]]:
    """One layer's attention over a packed row, forward and backward.

    The first run of a mix is reported apart, since cuDNN plans for every new length.
    """
    heads, key_heads, width = sizes.heads
    found = []
    for mix, lengths in {"warm-up": [7], **mixes(sizes.row_tokens)}.items():
        shapes = [(1, count, sum(lengths), width) for count in (heads, key_heads, key_heads)]
        rows = [torch.randn(s, device=device.torch, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        ends = torch.tensor([0, *lengths], device=device.torch).cumsum(0, dtype=torch.int32)
        arguments = {"cu_seq_lens_q": ends, "max_length_q": max(lengths), "sequence_lengths": lengths}
        gradient = torch.randn(1, sum(lengths), heads, width, device=device.torch, dtype=torch.bfloat16)
        programs = {
            name: device.timed(_forward_backward(function, rows, gradient, arguments))
            for name, function in {"varlen": packed_varlen, "sdpa": packed_sdpa}.items()
        }
        first = {}
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            first[name] = time.perf_counter() - started
        seconds = best(take_turns(programs, sizes.rounds, SLOW_S))
        # Two products forward and five backward, over the causal half of the pairs.
        flops = 7 * heads * width * sum(length**2 for length in lengths)
        rates = {name: flops / s for name, s in seconds.items()}
        found.append({"mix": mix, "lengths": lengths, "first_s": first, "s": seconds, "flops_per_s": rates})
    return found[1:]


def _forward_backward(
    function: Callable[..., Any], rows: list[Tensor], gradient: Tensor, arguments: dict[str, Any]
) -> Program:
    module: Any = nn.Identity()
    module.num_key_value_groups = rows[0].shape[1] // rows[1].shape[1]  # transformers' function for SDPA reads it

    def run() -> None:
        output, _ = function(module, *rows, None, **arguments)
        torch.autograd.grad(output, rows, gradient)

    return run


def logprobs(device: Device, sizes: Sizes) -> list[dict[str, Any]]:
    """Logprobs of N tokens and their gradients for hidden states and output layer: in chunks, and from all logits."""
    head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=device.torch, dtype=torch.bfloat16)
    head.__class__ = OutputHead
    found = []
    for count in sizes.logprob_tokens:
        hidden = torch.randn(count, sizes.hidden, device=device.torch, dtype=torch.bfloat16, requires_grad=True)
        token_ids = torch.randint(sizes.vocabulary, (count,), device=device.torch)

        def chunks(hidden: Tensor = hidden, token_ids: Tensor = token_ids) -> None:
            head(hidden, token_ids)[0].sum().backward()

        def all_logits(hidden: Tensor = hidden, token_ids: Tensor = token_ids) -> None:
            logits = head(hidden).float()
            torch.log_softmax(logits, -1).gather(-1, token_ids[:, None]).sum().backward()

        for way, program in {"in chunks": chunks, "all logits": all_logits}.items():
            try:
                program()  # warms up
                head.weight.grad = hidden.grad = None
                figures: dict[str, Any] = device.measure(program)
            except torch.OutOfMemoryError:
                figures = {"out_of_memory": True}
            head.weight.grad = hidden.grad = None
            device.free()
            found.append({"way": way, "tokens": count, **figures})
    return found
