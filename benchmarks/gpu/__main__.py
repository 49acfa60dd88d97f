"""What one GPU does: the recursion, attention, logprobs, updates of real layers, and the precision of bfloat16.

    python -m benchmarks.gpu [--quick] [--parts recursion attention ...] [--budget-s 450]

It needs torch (2.11 or newer), Triton, numba and transformers. The part `deepspeed` also needs DeepSpeed, peft, pydantic
and pebble; where they are missing it says so. All models have random weights. Results are saved after every part. A part
that would begin after the budget is left out; one that fails is reported and does not stop the others.

    matrix      a product of two bfloat16 matrices of 8,192 x 8,192: the rate that other figures are compared with
    recursion   advantages and critic targets, beside padded loops in the forms of verl and OpenRLHF on the same GPU
    attention   one layer over a packed row, forward and backward: one call of `varlen_attn`, and SDPA per length
    logprobs    logprobs and gradients from 151,936 words: in chunks, and from all logits
    policy, critic   an update in rows of 18,432 tokens with recomputed activations, by phase. Weights are bfloat16,
                gradients and AdamW float32, without DeepSpeed. A model whose training state takes more than three quarters
                of the memory loses layers; the table says how many it has
    precision   logprobs in bfloat16 with varlen attention, against float32 with SDPA
    deepspeed   the policy's update by the learner of `sae_rl` under ZeRO 2

MFU is model FLOPs (recomputed ones not counted) per second, over the dense bfloat16 rate of the vendor's datasheet.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu import kernels, tables, updates
from benchmarks.gpu.device import Device, adapt_varlen, kernels_of
from benchmarks.gpu.sizes import FULL, QUICK, TINY, Sizes
from benchmarks.results import parser, save

Part = Callable[[], Any]


def parts_of(device: Device, sizes: Sizes) -> dict[str, Part]:
    """The measurements by name, those that tell most first."""
    found: dict[str, Part] = {
        "matrix": lambda: kernels.matrix_rate(device),
        "recursion": lambda: kernels.recursion(device, sizes),
        "attention": lambda: kernels.attention(device, sizes),
        "logprobs": lambda: kernels.logprobs(device, sizes),
        "precision": lambda: updates.precision(sizes, device),
    }
    for name in sizes.models:
        for role in ("policy", "critic"):
            found[f"{role} {name}"] = partial(updates.update, role, name, sizes, device)
    first = next(iter(sizes.models))
    found["deepspeed"] = lambda: updates.deepspeed_update("policy", first, sizes, device, stage=2)
    return found


def measure(part: Part) -> Any:
    """Its figures, or ``{"failed": the reason}``."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__, "gpu", rounds=5)
    made.add_argument("--quick", action="store_true", help="fewer layers, rounds and sizes: about two minutes")
    made.add_argument("--parts", nargs="+", help="only those whose names begin with one of these words")
    made.add_argument("--budget-s", type=float, default=450.0, help="no part begins later")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny sizes, to try the program")
    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("torch sees no GPU here")
    device = Device(options.device)
    sizes = QUICK if options.quick else FULL
    return run(device, sizes if device.is_gpu else TINY, options.parts, options.budget_s, options.output)


def run(device: Device, sizes: Sizes, wanted: list[str] | None, budget_s: float, output: Path) -> dict[str, Any]:
    """Measures the parts in turn, and saves and shows each as soon as it is there."""
    started, console = time.perf_counter(), Console(width=140)
    found: dict[str, Any] = {"gpu": device.facts(), "datasheet_flops_per_s": device.datasheet_flops(), "parts": {}}
    if missing := adapt_varlen():
        found["varlen"] = missing
        console.print(missing)
    console.print(found["gpu"])
    with kernels_of(device):
        for name, part in parts_of(device, sizes).items():
            if wanted and not any(name.startswith(word) for word in wanted):
                continue
            begun = time.perf_counter()
            is_late = begun - started > budget_s
            figures = {"failed": f"left out: {budget_s:g} s were over"} if is_late else measure(part)
            device.free()
            found["parts"][name] = {"figures": figures, "took_s": time.perf_counter() - begun}
            console.print(tables.of(name, found))
            save(output, found)
    return found


if __name__ == "__main__":
    main()
