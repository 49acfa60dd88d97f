"""From the answers of a role's ranks to the tensors and metrics of the whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sae_rl.types import Batch


def merge_scores(parts: list[tuple[Tensor, dict[str, Tensor]]], batch: Batch) -> dict[str, Tensor]:
    """Scores of each rank's tokens -> flat (N,) tensors by name; NaN where no rank answered, 0 where the mask is False."""
    names = [name for _, outputs in parts for name in outputs]
    merged = {name: torch.full((batch.num_tokens,), float("nan")) for name in names}
    if batch.action_mask is not None:
        for flat in merged.values():
            flat[~batch.action_mask] = 0.0
    for index, outputs in parts:
        for name, output in outputs.items():
            merged[name][index] = output
    return merged


def update_metrics(ranks: list[list[dict[str, float]]], role: str, peak_tflops: float | None) -> dict[str, float]:
    """Sums by rank and update -> means over tokens, and the mean gradient norm over updates.

    Args:
        peak_tflops: the peak of one GPU, for MFU; None: MFU is left out.
    """
    updates = [update for updates_of_rank in ranks for update in updates_of_rank]
    num_tokens = sum(update["tokens"] for update in updates)
    names = [name for name in ranks[0][0] if "/" in name]
    metrics = {name: sum(update.get(name, 0.0) for update in updates) / num_tokens for name in names}
    first = ranks[0]
    norms = [update["grad_norm"] for update in first if math.isfinite(update["grad_norm"])]
    seconds = max(sum(update["seconds"] for update in updates_of_rank) for updates_of_rank in ranks)
    sums = {name: sum(update[name] for update in updates) for name in ("flops", "positions", "real_positions")}
    tflops = sums["flops"] / seconds / len(ranks) / 1e12
    metrics |= {
        f"{role}/grad_norm": sum(norms) / len(norms) if norms else math.nan,
        f"{role}/skipped_updates": float(len(first) - len(norms)),
        f"{role}/lr": first[-1]["lr"],
        f"{role}/num_updates": float(len(first)),
        f"time/{role}_update_s": seconds,
        f"throughput/{role}_update_tflops": tflops,
        f"throughput/{role}_padding_fraction": 1 - sums["real_positions"] / sums["positions"],
        f"memory/{role}_peak_gb": max(updates_of_rank[-1]["peak_memory_gb"] for updates_of_rank in ranks),
    }
    return metrics if peak_tflops is None else metrics | {f"throughput/{role}_mfu": tflops / peak_tflops}
