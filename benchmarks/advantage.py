"""Advantages of one batch: this library, loops over padded time as in other trainers, and the limit set by memory.

    python -m benchmarks.advantage [--shapes 512x1024 512x8192 4096x8192 8x131072] [--rounds 5]

Lengths are lognormal (sigma 0.6), so about half of a padded batch is padding. Values and logprobs are random, 1.8 % of the
tokens open a segment, and the last token of each response has the reward. The floor is one pass over the real tokens that
reads three float32 arrays and writes two, 20 bytes per token, always in the same memory. Programs take turns in every round.
The table shows the best time of each program and ratios of best times. Programs use one thread unless their name says two,
and return new tensors unless their name says that memory is reused: the first use of memory costs more than the arithmetic.

"Whole" is `segmental_advantages` with all its checks, then `Whitening` of the advantages.

The padded loops are our own code in the form of other trainers: "verl's form" carries value and advantage over masked
positions, "OpenRLHF's form" masks its inputs first. They compute GAE, which costs as much as SAE. torchrl is timed if it is
installed, with one lambda per token, so that it computes SAE.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba  # type: ignore[import-untyped]
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.turns import take_turns
from sae_rl.algo import Whitening, segmental_advantages, td_recursion

RESULTS = Path(__file__).parent / "results" / "advantage.json"
SHAPES = ["512x1024", "512x8192", "4096x8192", "8x131072"]
P, LAM, OPENS_FRACTION = 0.2, 0.95, 0.018
SLOW_S = 2.0  # a program that takes longer runs once
FLOOR = "floor: 20 bytes a token"
REUSED, TWO = ", reused memory", ", two threads"
RECURSION, WHOLE = "sae_rl recursion", "sae_rl whole: segments, recursion, whitening"

Program = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """One ragged batch, and its mask when padded on the right."""

    rewards: Tensor  # (N,)
    values: Tensor  # (N,)
    logprobs: Tensor  # (N,)
    opens: Tensor  # (N,) bool
    offsets: Tensor  # (B+1,)
    mask: Tensor  # (B, T) bool

    def padded(self, flat: Tensor) -> Tensor:
        rows = torch.zeros(self.mask.shape, dtype=flat.dtype)
        rows[self.mask] = flat
        return rows


def make(num_responses: int, max_tokens: int, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(math.log(0.42 * max_tokens), 0.6, num_responses).astype(np.int64), 1, max_tokens)
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    num_tokens = int(offsets[-1])
    unsure = rng.random(num_tokens) < OPENS_FRACTION
    logprobs = torch.from_numpy(np.log(np.where(unsure, 0.1, 0.9)).astype(np.float32))
    rewards = torch.zeros(num_tokens)
    rewards[offsets[1:] - 1] = torch.from_numpy(rng.integers(0, 2, num_responses).astype(np.float32))
    opens = torch.from_numpy(unsure)
    opens[offsets[:-1]] = True
    mask = torch.arange(max_tokens)[None, :] < torch.from_numpy(lengths)[:, None]
    return Workload(rewards, torch.from_numpy(rng.random(num_tokens, dtype=np.float32)), logprobs, opens, offsets, mask)


@numba.njit(fastmath=True)  # type: ignore[untyped-decorator]
def read_three_write_two(a: Any, b: Any, c: Any, x: Any, y: Any) -> None:
    for i in range(a.size):
        total = a[i] + b[i] + c[i]
        x[i] = total
        y[i] = total - b[i]


def loop_in_the_form_of_verl(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Value and advantage are carried over masked positions by blending."""
    kept = mask.to(values.dtype)
    next_value, carried = values.new_zeros(len(values)), values.new_zeros(len(values))
    columns: list[Tensor] = []
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + next_value - values[:, t]
        here, advantage = kept[:, t], delta + lam * carried
        next_value = values[:, t] * here + (1 - here) * next_value
        carried = advantage * here + (1 - here) * carried
        columns.append(carried)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def loop_in_the_form_of_openrlhf(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Inputs are set to 0 outside the mask before a plain loop."""
    values, rewards = values * mask, rewards * mask
    carried: Tensor | float = 0.0
    columns: list[Tensor] = []
    for t in range(values.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        carried = rewards[:, t] + next_value - values[:, t] + lam * carried
        columns.append(carried)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def torchrl_with_a_lambda_per_token(work: Workload) -> Program | None:
    try:
        from torchrl.objectives.value.functional import generalized_advantage_estimate  # type: ignore[import-not-found]
    except ImportError:
        return None
    values, rewards = work.padded(work.values)[..., None], work.padded(work.rewards)[..., None]
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    next_opens = torch.cat([work.padded(work.opens)[:, 1:], torch.zeros_like(work.mask[:, :1])], dim=1)[..., None]
    lams = torch.where(next_opens, LAM, 1.0)
    done = torch.zeros_like(values, dtype=torch.bool)
    done[torch.arange(len(values)), work.offsets.diff() - 1] = True
    return lambda: generalized_advantage_estimate(1.0, lams, values, next_values, rewards, done)


def programs(work: Workload) -> dict[str, Program]:
    whiten = Whitening()
    flat = (work.rewards, work.values, work.logprobs)
    out = (torch.empty_like(work.values), torch.empty_like(work.values))
    x, y = (part.numpy() for part in out)
    arrays = [tensor.numpy() for tensor in flat]

    def recursion(**more: Any) -> Program:
        known = {"gamma": 1.0, "lam": LAM, "value_lam": 1.0} | more
        return lambda: td_recursion(work.rewards, work.values, work.opens, work.offsets, **known)

    def whole() -> Tensor:
        return whiten(segmental_advantages(*flat, work.offsets, p=P, lam=LAM)[0])

    def whole_reused() -> Tensor:
        return whiten(segmental_advantages(*flat, work.offsets, p=P, lam=LAM, out=out)[0], out=out[0])

    rewards, values = work.padded(work.rewards), work.padded(work.values)
    logprobs = work.padded(work.logprobs)
    found: dict[str, Program | None] = {
        FLOOR: lambda: read_three_write_two(*arrays, x, y),
        RECURSION: recursion(),
        RECURSION + REUSED: recursion(out=out),
        RECURSION + REUSED + TWO: recursion(out=out, num_threads=2),
        WHOLE: whole,
        WHOLE + REUSED: whole_reused,
        "segmental_advantages, padded": lambda: segmental_advantages(
            rewards, values, logprobs, mask=work.mask, p=P, lam=LAM
        ),
        "padded loop, verl's form": lambda: loop_in_the_form_of_verl(rewards, values, work.mask, LAM),
        "padded loop, OpenRLHF's form": lambda: loop_in_the_form_of_openrlhf(rewards, values, work.mask, LAM),
        "torchrl, a lambda per token": torchrl_with_a_lambda_per_token(work),
    }
    return {name: program for name, program in found.items() if program is not None}


def summarize(shape: str, work: Workload, seconds: dict[str, list[float]]) -> dict[str, Any]:
    best = {name: min(runs) for name, runs in seconds.items()}
    num_tokens = work.values.numel()
    return {
        "shape": shape,
        "tokens": num_tokens,
        "padding_fraction": 1 - num_tokens / work.mask.numel(),
        "programs": {
            name: {
                "best_s": best[name],
                "seconds": seconds[name],
                "tokens_per_s": num_tokens / best[name],
                "times_the_floor": best[name] / best[FLOOR],
                "times_sae_rl_recursion": best[name] / best[RECURSION],
            }
            for name in seconds
        },
    }


def table(summaries: list[dict[str, Any]]) -> Table:
    shown = Table(title="best time, times the memory floor, times sae_rl's recursion")
    shown.add_column("")
    for found in summaries:
        padding = 100 * found["padding_fraction"]
        shown.add_column(f"{found['shape']}\n{found['tokens']:,} tokens\n{padding:.0f} % padding", justify="right")
    for name in summaries[0]["programs"]:
        cells = []
        for found in summaries:
            one = found["programs"][name]
            cells.append(
                f"{1e3 * one['best_s']:,.2f} ms {one['times_the_floor']:,.1f}x {one['times_sae_rl_recursion']:,.1f}x"
            )
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="responses x longest response")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: found {options.rounds}, allowed: at least 1")
    torch.set_num_threads(1)
    console = Console(width=160)
    summaries = []
    for shape in options.shapes:
        work = make(*(int(number) for number in shape.split("x")))
        summaries.append(summarize(shape, work, take_turns(programs(work), options.rounds, SLOW_S)))
        console.print(f"{shape} measured")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine, "shapes": summaries}, indent=1) + "\n")
    console.print(table(summaries))
    console.print(f"figures: {options.output}")


if __name__ == "__main__":
    main()
