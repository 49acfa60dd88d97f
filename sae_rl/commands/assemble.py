"""Builds the parts of a run (Ray, workers, rewards, records), and closes them however the run ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields

from sae_rl.commands.preflight import Ready
from sae_rl.commands.run_folder import write_config
from sae_rl.config.schema import RewardsConfig
from sae_rl.records.clock import Clock
from sae_rl.records.records import Records
from sae_rl.rewards.pool import RewardPool
from sae_rl.run import Run
from sae_rl.workers.session import Session, ray_session, start_workers

NUM_PROBE_PROMPTS = 16


@contextlib.contextmanager
def assembled(ready: Ready, session: Session | None = None) -> Iterator[Run]:
    """Builds a run with started workers; closes everything at the end, but what ``session`` keeps for the next run."""
    config, resume_from, sampler, clock = ready.config, ready.resume_from, ready.sampler, Clock()
    assert sampler is not None, "only an evaluation has none"
    with contextlib.ExitStack() as stack:
        resumed = resume_from is not None
        records = stack.enter_context(Records(config, config.output_dir, ready.first_step, resumed=resumed))
        write_config(config, records)
        records.note(f"resuming from {resume_from}" if resume_from else f"new run in {config.output_dir}")
        with clock.phase("ray"):
            stack.enter_context(ray_session(config) if session is None else session.ray(config))
        probe_prompts = list(sampler.prompts[:NUM_PROBE_PROMPTS])
        with clock.phase("workers"):
            starting = start_workers(config, probe_prompts, clock, ready.roles, records.note, session)
            workers = stack.enter_context(starting)
        rewards = stack.enter_context(reward_pool(config.rewards))
        for note in ready.notes:
            records.note(note)
        yield Run(
            config=ready.resolved,
            sampler=sampler,
            heldout=ready.heldout,
            workers=workers,
            rewards=rewards,
            records=records,
            clock=clock,
            resume_from=resume_from,
        )


def reward_pool(config: RewardsConfig) -> RewardPool:
    return RewardPool(**{field.name: getattr(config, field.name) for field in fields(RewardPool)})
