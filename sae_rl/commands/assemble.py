"""Puts a run together: prompts, Ray, workers, rewards and records; and takes it apart again, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_rl import checkpoint
from sae_rl.algo.segmenters import with_vocabulary
from sae_rl.commands.run_folder import write_config
from sae_rl.config.schema import Config, RewardsConfig
from sae_rl.data.load import load_task
from sae_rl.data.sampler import PromptSampler
from sae_rl.driver import Run
from sae_rl.records.clock import Clock
from sae_rl.records.records import Records
from sae_rl.rewards.pool import RewardPool
from sae_rl.rewards.table import resolve, warnings_of
from sae_rl.settings import ConfigError
from sae_rl.types import Prompt
from sae_rl.workers.placement import Role
from sae_rl.workers.session import ray_session, start_workers

NUM_PROBE_PROMPTS = 2


@contextlib.contextmanager
def assembled(config: Config, roles: list[Role], resume_from: Path | None) -> Iterator[Run]:
    """Everything that a run works with, its workers started; taken apart at the end."""
    tokenizer = load_tokenizer(config.model.path)
    resolved = with_delimiters(config, tokenizer)
    sampler, heldout = load_task(config, tokenizer)
    first_step = continued(sampler, resume_from) if resume_from else 0
    clock = Clock()
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(Records(config, config.output_dir, first_step, resumed=resume_from is not None))
        write_config(config, records)
        records.note(f"resuming from {resume_from}" if resume_from else f"new run in {config.output_dir}")
        for text in verifier_warnings(config, [*sampler.prompts, *heldout]):
            records.note(text)
        stack.enter_context(ray_session(config))
        workers = stack.enter_context(
            start_workers(config, list(sampler.prompts[:NUM_PROBE_PROMPTS]), clock, roles, records.note)
        )
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


def continued(sampler: PromptSampler, resume_from: Path) -> int:
    """Sets the sampler behind a checkpoint. Returns the steps that are done. Raises ConfigError if it is of other prompts."""
    try:
        state = checkpoint.read_state(resume_from)
        sampler.load_state(state.sampler)
    except ValueError as error:
        raise ConfigError([f"cannot resume from {resume_from}: {error}"]) from error
    return state.step


def reward_pool(config: RewardsConfig) -> RewardPool:
    return RewardPool(
        num_processes=config.num_processes,
        deadline_s=config.deadline_s,
        memory_gb=config.memory_gb,
        failed_score=config.failed_score,
        max_failed_fraction=config.max_failed_fraction,
        verifiers=config.verifiers,
    )


def verifier_warnings(config: Config, prompts: list[Prompt]) -> list[str]:
    """What the verifiers of these prompts cannot prevent here. Raises ConfigError if one cannot work at all."""
    names = sorted({prompt.reward for prompt in prompts})
    try:
        return warnings_of(resolve(name, config.rewards.verifiers) for name in names)
    except OSError as error:
        raise ConfigError([f"rewards.verifiers: {error}"]) from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.path = {path}: no tokenizer can be loaded from there ({error})"]) from error
    if len(tokenizer) < 2:  # what transformers makes of a folder without tokenizer files
        raise ConfigError(
            [f"model.path = {path}: the folder has no tokenizer; add tokenizer.json and its configuration"]
        )
    return tokenizer


def with_delimiters(config: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """The configuration with a segmenter that knows the tokens of its delimiter strings."""
    try:
        segmenter = with_vocabulary(
            config.algorithm.segmenter, lambda: [tokenizer.decode([i]) for i in range(len(tokenizer))]
        )
    except ValueError as error:
        raise ConfigError([f"algorithm.segmenter: {error}"]) from error
    algorithm = config.algorithm.model_copy(update={"segmenter": segmenter})
    return config.model_copy(update={"algorithm": algorithm})
