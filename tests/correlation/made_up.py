"""Measurements with random numbers."""

from __future__ import annotations

import torch

from sae_rl.correlation.measurements import Measurements, neutral_places
from sae_rl.types import Batch, Prompt, Rollout


def made_up_batch(lengths: tuple[int, ...] = (5, 1, 7, 3), group_size: int = 2) -> Batch:
    """Responses of these lengths, in groups; rewards alternate."""
    random = torch.Generator().manual_seed(0)
    rollouts = [
        Rollout(
            prompt=Prompt(
                id=str(i // group_size), text="", token_ids=(1, 2 + i // group_size), answer="", task="", reward=""
            ),
            sample=i % group_size,
            token_ids=torch.randint(3, 60, (length,), generator=random, dtype=torch.int32),
            rollout_logprobs=-torch.rand(length, generator=random),
            text="",
            finish_reason="stop",
            policy_versions=torch.zeros(length, dtype=torch.int32),
            temperature=0.9,
        )
        for i, length in enumerate(lengths)
    ]
    return Batch.of(rollouts, [float(i % 2) for i in range(len(rollouts))])


def made_up_measurements(*, dimension: int | None = 4) -> Measurements:
    """Two estimators, three continuations from each place, of which one failed."""
    batch, random = made_up_batch(), torch.Generator().manual_seed(1)
    places = neutral_places(batch.lengths, 3)
    continued = torch.randint(0, 2, (places.numel(), 3), generator=random).double()
    continued[1, 2] = torch.nan
    return Measurements(
        batch=batch,
        returns=batch.rewards.double(),
        places=places,
        neutral=torch.ones_like(places, dtype=torch.bool),
        continued=continued,
        names=("sae", "gae"),
        advantages=torch.randn(2, batch.num_tokens, generator=random, dtype=torch.float64),
        opens=torch.rand(2, batch.num_tokens, generator=random),
        gradients=None if dimension is None else torch.randn(3, 2, dimension, generator=random),
    )
