"""Learning rates against the schedules of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup
from transformers.optimization import get_cosine_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

from sae_rl.backends.lr_schedule import LrSchedule
from sae_rl.config.schema import OptimizerConfig

NUM_UPDATES, WARMUP, LR = 40, 5, 0.25


def options(schedule: str, least: float = 0.0, warmup: int = WARMUP) -> OptimizerConfig:
    return OptimizerConfig(
        lr=LR,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        warmup_updates=warmup,
        schedule=schedule,  # type: ignore[arg-type]
        min_lr_fraction=least,
        max_grad_norm=1.0,
        max_skipped_updates=3,
    )


def rates_of_transformers(schedule: str, least: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=LR)
    if schedule == "constant":
        made = get_constant_schedule_with_warmup(optimizer, WARMUP)
    elif schedule == "linear":
        made = get_linear_schedule_with_warmup(optimizer, WARMUP, NUM_UPDATES)
    elif least:
        made = get_cosine_with_min_lr_schedule_with_warmup(optimizer, WARMUP, NUM_UPDATES, min_lr_rate=least)
    else:
        made = get_cosine_schedule_with_warmup(optimizer, WARMUP, NUM_UPDATES)
    rates = []
    for _ in range(NUM_UPDATES):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return rates


@pytest.mark.parametrize(("name", "least"), [("constant", 0.0), ("linear", 0.0), ("cosine", 0.0), ("cosine", 0.2)])
def test_after_the_warm_up_rates_are_those_of_transformers(name: str, least: float) -> None:
    """The warm-up of transformers starts at 0, ours a step higher."""
    schedule = LrSchedule(options(name, least), NUM_UPDATES)
    found = [schedule.next() for _ in range(NUM_UPDATES)]
    assert found[:WARMUP] == pytest.approx([LR * (i + 1) / WARMUP for i in range(WARMUP)])
    assert found[WARMUP:] == pytest.approx(rates_of_transformers(name, least)[WARMUP:])


def test_updates_after_the_last_keep_the_final_rate() -> None:
    schedule = LrSchedule(options("linear", 0.1), 10)
    rates = [schedule.next() for _ in range(20)]
    assert rates[10:] == pytest.approx([0.1 * LR] * 10)
    assert rates[0] < rates[4] == pytest.approx(LR)


def test_a_held_rate_and_the_schedule_after_it() -> None:
    schedule, fresh = LrSchedule(options("cosine"), NUM_UPDATES), LrSchedule(options("cosine"), NUM_UPDATES)
    schedule.hold(3.0)
    held = [schedule.next() for _ in range(30)]
    assert held[WARMUP:] == [3.0] * 25
    assert held[0] == pytest.approx(3.0 / WARMUP)
    schedule.restart()
    assert [schedule.next() for _ in range(NUM_UPDATES)] == [fresh.next() for _ in range(NUM_UPDATES)]
