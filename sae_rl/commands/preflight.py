"""Everything that can be checked before a process starts. Each command that runs a model passes here first."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from sae_rl.algo.segmenters import with_vocabulary
from sae_rl.commands.model_files import (
    check_computed,
    check_critics_tokens,
    check_model,
    check_vocabulary,
    load_tokenizer,
)
from sae_rl.commands.prompts import check_rewards, load_heldout, load_task
from sae_rl.commands.run_folder import check_output, read_checkpoint
from sae_rl.config.schema import Config
from sae_rl.config.trial import try_rewards
from sae_rl.critic import card
from sae_rl.data.sampler import PromptSampler
from sae_rl.settings import ConfigError
from sae_rl.types import Prompt
from sae_rl.workers.session import check_address

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes seconds, which a mistake is told before

GIB = 2**30
STATE_BYTES = 12  # a checkpoint has at least Adam's moments and float32 weights of each parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A run whose parts were all checked, and that has started no process."""

    config: Config
    resolved: Config  # the same, with the token ids of a segmenter's delimiters
    roles: list[str]
    tokenizer: PreTrainedTokenizerBase
    sampler: PromptSampler | None  # in the state that the run begins with; None: nothing is trained
    heldout: list[Prompt]
    resume_from: Path | None
    first_step: int
    notes: list[str]  # for the user

    def outline(self) -> Iterator[str]:
        """What the run would do, in lines."""
        config = self.config
        training = f"{len(self.sampler.prompts):,} to train on, " if self.sampler else ""
        address = config.cluster.address or "a local Ray"
        workers = ", ".join(f"{getattr(config.cluster, role).num_workers} {role}" for role in self.roles)
        yield f"prompts: {training}{len(self.heldout):,} held out"
        yield f"model: {config.model.path}, {len(self.tokenizer):,} tokens"
        if "critic" in self.roles and config.critic_model.path != config.model.path:
            yield f"critic: {config.critic_model.path}"
        yield f"workers: {workers}, on {config.cluster.device}, in {address}"
        if self.sampler is not None:
            yield f"steps: {self.first_step} to {config.steps}, each of {config.responses_per_step} responses"
        yield f"output: {config.output_dir}" + (f", from {self.resume_from}" if self.resume_from else "")
        yield from self.notes


def prepared(
    config: Config,
    roles: list[str],
    *,
    resume_from: Path | None = None,
    more: Sequence[Callable[[], str | None]] = (),
) -> Ready:
    """Checks everything that a run needs, and loads its prompts. Nothing is written.

    Args:
        roles: of the workers that it starts.
        more: other checks. Each raises ConfigError, or returns a note for the user.

    Raises:
        ConfigError: everything that is wrong; what is wrong with prompts only if all else is right.
    """
    trained = [role for role in roles if role in ("policy", "critic")]
    notes: list[str | None] = []
    problems: list[str] = []
    for check in (
        lambda: check_address(config),
        lambda: check_output(config),
        lambda: _check_models(config, trained, resume_from),
        lambda: check_rewards(config),
        lambda: _check_parts(config, trained, resume_from),
        *more,
    ):
        try:
            notes.append(check())
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    tokenizer = cache(partial(load_tokenizer, config.model.path))
    sampler, heldout = load_task(config, tokenizer) if trained else (None, load_heldout(config, tokenizer))
    if problems := try_rewards(config, [*(sampler.prompts if sampler else ()), *heldout]):
        raise ConfigError(problems)
    resolved = with_delimiters(config, tokenizer())
    if "policy" in trained:
        check_computed(config)
    if "critic" in trained:
        check_critics_tokens(config, tokenizer())
    check_vocabulary(config.model.path, [*(sampler.prompts if sampler else ()), *heldout])
    return Ready(
        config=config,
        resolved=resolved,
        roles=roles,
        tokenizer=tokenizer(),
        sampler=sampler,
        heldout=heldout,
        resume_from=resume_from,
        first_step=restore_sampler(sampler, resume_from) if sampler and resume_from else 0,
        notes=[note for note in notes if note],
    )


def check_critic(config: Config) -> str | None:
    """A note about ``learner.critic_pretraining.checkpoint``, if the run begins with it. Raises ConfigError if it cannot."""
    folder = config.learner.critic_pretraining.checkpoint
    if folder is None or not config.algorithm.needs_critic:
        return None
    note = card.describe(config)
    check_model("learner.critic_pretraining.checkpoint", folder, generates=False)
    return note


def show_outline(ready: Ready) -> None:
    """The end of a command with ``dry_run=true``."""
    print("every check passed; dry_run = true, so nothing is started")
    for line in ready.outline():
        print(f"  {line}")


def _check_models(config: Config, trained: list[str], resume_from: Path | None) -> None:
    """Raises ConfigError if a model cannot be loaded, or if the disk cannot hold the checkpoints that the run keeps."""
    sizes = critics = check_model("model.path", config.model.path)
    if "critic" in trained and (key := config.critic_model_key) == "learner.critic.model.path":
        critics = check_model(key, config.critic_model.path)
    if sizes is not None and critics is not None and "policy" in trained:
        _check_space(config, trained, sizes, critics, resume_from)


def _check_space(
    config: Config, trained: list[str], sizes: dict[str, int], critics: dict[str, int], resume_from: Path | None
) -> None:
    """Raises ConfigError if the disk of ``output_dir`` cannot hold the checkpoints that the run keeps.

    Args:
        sizes, critics: the parameters of each tensor of the policy's and the critic's base models.
    """
    total, body = sum(sizes.values()), sum(size for name, size in critics.items() if not name.startswith("lm_head"))
    states = {"policy": 0 if config.learner.lora.rank else total, "critic": config.algorithm.num_critics * body}
    exported = {"bfloat16": 2, "float32": 4}[config.model.precision] * total
    one = exported + STATE_BYTES * sum(states[role] for role in trained)
    every, there = config.checkpoint.every_steps, len(list(resume_from.parent.iterdir())) if resume_from else 0
    # A new one is written before the oldest is removed.
    count = min(config.checkpoint.keep_last + 1, math.ceil(config.steps / every) if every else 1) - there
    folder = next(each for each in (config.output_dir, *config.output_dir.absolute().parents) if each.exists())
    if (free := shutil.disk_usage(folder).free) < count * one:
        found = (
            f"output_dir = {config.output_dir}: {free / GIB:,.1f} GiB are free, but {count} checkpoints take at least"
        )
        advice = "choose a larger disk, or lower checkpoint.keep_last"
        raise ConfigError([f"{found} {count * one / GIB:,.1f} GiB ({one / GIB:,.1f} each); {advice}"])


def _check_parts(config: Config, trained: list[str], resume_from: Path | None) -> None:
    """Raises ConfigError if the checkpoint that a run resumes from lacks a part, or was written by fewer ranks."""
    if resume_from is None:
        return
    read_checkpoint(resume_from)
    for role in trained:
        ranks = len(list((resume_from / role).glob("random_state_*.pt")))
        wanted = getattr(config.cluster, role).num_workers
        if not ranks:
            raise ConfigError(
                [f"cannot resume from {resume_from}: it lacks its {role}; remove it to resume from an earlier one"]
            )
        if ranks < wanted:
            found = f"cannot resume from {resume_from}: {ranks} ranks of the {role} wrote it"
            raise ConfigError([f"{found}, but cluster.{role}.num_workers = {wanted}"])


def restore_sampler(sampler: PromptSampler, resume_from: Path) -> int:
    """Restores the sampler from a checkpoint. Returns the number of steps done.

    Raises:
        ConfigError: the checkpoint was made with other prompts or another seed.
    """
    state = read_checkpoint(resume_from)
    try:
        sampler.load_state(state.sampler)
    except ValueError as error:
        raise ConfigError([f"cannot resume from {resume_from}: {error}"]) from error
    return state.step


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
