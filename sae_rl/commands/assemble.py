"""Builds the parts of a run (prompts, Ray, workers, rewards, records), and closes them however the run ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_rl import checkpoint
from sae_rl.algo.segmenters import with_vocabulary
from sae_rl.commands.prompts import load_task
from sae_rl.commands.run_folder import write_config
from sae_rl.config.schema import Config, RewardsConfig
from sae_rl.data.sampler import PromptSampler
from sae_rl.records.clock import Clock
from sae_rl.records.records import Records
from sae_rl.rewards.pool import RewardPool
from sae_rl.run import Run
from sae_rl.settings import ConfigError
from sae_rl.workers.session import Session, ray_session, start_workers

NUM_PROBE_PROMPTS = 16


@contextlib.contextmanager
def assembled(
    config: Config, roles: list[str], resume_from: Path | None, session: Session | None = None
) -> Iterator[Run]:
    """Builds a run with started workers; closes everything at the end, but what ``session`` keeps for the next run."""
    tokenizer = load_tokenizer(config.model.path)
    resolved = with_delimiters(config, tokenizer)
    sampler, heldout = load_task(config, tokenizer)
    first_step = restore_sampler(sampler, resume_from) if resume_from else 0
    clock = Clock()
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(Records(config, config.output_dir, first_step, resumed=resume_from is not None))
        write_config(config, records)
        records.note(f"resuming from {resume_from}" if resume_from else f"new run in {config.output_dir}")
        stack.enter_context(ray_session(config) if session is None else session.ray(config))
        probe_prompts = list(sampler.prompts[:NUM_PROBE_PROMPTS])
        workers = stack.enter_context(start_workers(config, probe_prompts, clock, roles, records.note, session))
        rewards = stack.enter_context(reward_pool(config.rewards))
        yield Run(
            config=resolved,
            sampler=sampler,
            heldout=heldout,
            workers=workers,
            rewards=rewards,
            records=records,
            clock=clock,
            resume_from=resume_from,
        )


def restore_sampler(sampler: PromptSampler, resume_from: Path) -> int:
    """Restores the sampler from a checkpoint. Returns the number of steps done.

    Raises:
        ConfigError: the checkpoint was made with other prompts or another seed.
    """
    try:
        state = checkpoint.read_state(resume_from)
        sampler.load_state(state.sampler)
    except ValueError as error:
        raise ConfigError([f"cannot resume from {resume_from}: {error}"]) from error
    return state.step


def reward_pool(config: RewardsConfig) -> RewardPool:
    return RewardPool(**{field.name: getattr(config, field.name) for field in fields(RewardPool)})


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.path = {path}: no tokenizer can be loaded from there ({error})"]) from error
    if len(tokenizer) < 2:  # transformers returns an empty tokenizer for a folder without tokenizer files
        raise ConfigError([f"model.path = {path}: the folder has no tokenizer; add the files of its tokenizer"])
    return tokenizer


def with_delimiters(config: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """Gives a segmenter with delimiter strings the token ids of those strings."""
    try:
        segmenter = with_vocabulary(
            config.algorithm.segmenter, lambda: [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
        )
    except ValueError as error:
        raise ConfigError([f"algorithm.segmenter: {error}"]) from error
    algorithm = config.algorithm.model_copy(update={"segmenter": segmenter})
    return config.model_copy(update={"algorithm": algorithm})
