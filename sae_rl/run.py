"""Puts a run together: prompts, Ray, workers, records; hands it to the driver; and takes it apart again, however it ends."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_rl import checkpoint, critic_files
from sae_rl.algo import with_vocabulary
from sae_rl.analysis.samples_page import write_samples_page
from sae_rl.clock import Clock
from sae_rl.config import Config, RewardsConfig, as_tree
from sae_rl.data.sampler import PromptSampler
from sae_rl.driver import Run, prepare_critic, train
from sae_rl.errors import ConfigError
from sae_rl.evaluation.evaluate import evaluate
from sae_rl.evaluation.files import publish, unpublished, write_evaluation
from sae_rl.overlapped import train_overlapped
from sae_rl.records import Records
from sae_rl.replay import recorded_files, train_replay
from sae_rl.rewards import resolve, warnings_of
from sae_rl.rewards.pool import RewardPool
from sae_rl.sources import load_heldout, load_task
from sae_rl.types import Prompt
from sae_rl.workers.placement import Role, pretraining_roles, roles_of
from sae_rl.workers.session import ray_session, start_rollout, start_workers

logger = logging.getLogger(__name__)
NUM_PROBE_PROMPTS = 2


def run_training(config: Config) -> None:
    """Trains as configured, from prompts to the exported policy in ``output_dir/policy``.

    Raises:
        ConfigError: data, folders or Ray's resources do not fit the configuration; no worker was started.
        WorkerError, RuntimeError: the run failed; its last checkpoint is usable.
    """
    if config.replay is not None:
        recorded_files(config.replay, config.steps)
    prepare_output(config)
    resume_from, told = find_checkpoint(config), []
    if config.algorithm.needs_critic and config.learner.critic_pretraining.checkpoint is not None:
        told.append(critic_files.describe(config))
    if config.evaluation.every_steps == 0 and config.replay is None:
        told.append("nothing is evaluated: evaluation.every_steps = 0")
    roles = [role for role in roles_of(config) if role != "rollout" or config.replay is None]
    with assembled(config, roles, resume_from) as run:
        for text in told:
            run.records.note(text)
        loop_of(config)(run)
    publish_policy(config)


def loop_of(config: Config) -> Callable[[Run], None]:
    """The driver that a configuration asks for."""
    if config.replay is not None:
        return train_replay
    return {"synchronous": train, "overlapped": train_overlapped}[config.schedule.mode]


def run_critic_pretraining(config: Config) -> Path:
    """Pre-trains a critic for ``model.path`` as configured, without training a policy.

    Returns:
        The folder with the critic, for ``learner.critic_pretraining.checkpoint`` of runs to come.

    Raises:
        ConfigError: as in `run_training`; or the estimator has no critic, or there are no prompts to pre-train on.
        RuntimeError: it failed, or the returns did not vary, so that nothing could be learnt.
    """
    key, folder = "learner.critic_pretraining", config.output_dir / "critic"
    if not config.algorithm.needs_critic:
        raise ConfigError(
            ["algorithm.estimator has no critic that could be pre-trained: choose algorithm=sae, gae, ..."]
        )
    if not config.learner.critic_pretraining.num_prompts:
        raise ConfigError([f"{key}.num_prompts = 0: pre-training needs prompts, at least 2"])
    for found, what in ((folder, "a critic"), (checkpoint.newest(config.output_dir / "checkpoints"), "a run")):
        if found is not None and found.exists():
            raise ConfigError([f"output_dir = {config.output_dir} holds {what} already; choose another output_dir"])
    prepare_output(config)
    with assembled(config, pretraining_roles(config), None) as run:
        explained_variance, num_responses = prepare_critic(run)
        if not math.isfinite(explained_variance):
            raise RuntimeError(
                "all responses had the same return, so the critic learnt nothing; are all rewards the same?"
            )
        partial = folder.with_name(".partial_critic")
        shutil.rmtree(partial, ignore_errors=True)
        run.workers.export_critic(partial)
        critic_files.write_card(partial, config, explained_variance, num_responses)
        partial.rename(folder)
    return folder


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


def run_evaluation(config: Config) -> Path:
    """Samples ``model.path`` on ``task.evaluation``, and says how good it is.

    Returns:
        A new folder in ``output_dir/evaluation`` with the numbers and every sample.

    Raises:
        ConfigError: as in `run_training`.
        WorkerError, RuntimeError: it failed; nothing was written.
    """
    prepare_output(config)
    tokenizer = load_tokenizer(config.model.path)
    segmenter = with_delimiters(config, tokenizer).algorithm.segmenter
    prompts = load_heldout(config, tokenizer)
    for text in verifier_warnings(config, prompts):
        logger.warning(text)
    clock, max_tokens = Clock(), config.rollout.max_response_tokens
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_session(config))
        rollout = stack.enter_context(start_rollout(config, clock))
        rewards = stack.enter_context(reward_pool(config.rewards))
        with clock.phase("evaluate"):
            result = evaluate(prompts, rollout, rewards, clock, config.evaluation, max_tokens, segmenter)
    with unpublished(config.output_dir) as folder:
        write_evaluation(folder, config, result, clock.so_far()["time/evaluate_s"])
        write_samples_page(folder, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
        return publish(folder, config.model.path)


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


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint to resume from.

    Raises:
        ConfigError: it has done all steps already, or a new run would mix with an old one.
    """
    newest = checkpoint.newest(config.output_dir / "checkpoints")
    if newest is None:
        return None
    if not config.resume:
        raise ConfigError(
            [
                f"output_dir = {config.output_dir} holds {newest.name} of another run; resume=true continues it, or choose "
                "another output_dir"
            ]
        )
    done = checkpoint.read_state(newest).step
    if done >= config.steps:
        publish_policy(config)  # a kill may have come between the last checkpoint and this
        raise ConfigError(
            [
                f"{newest} has done {done} steps and steps = {config.steps}: nothing is left to train; raise steps, or "
                "choose another output_dir"
            ]
        )
    return newest


def publish_policy(config: Config) -> None:
    """``output_dir/policy``: the policy of the newest checkpoint, for transformers and vLLM."""
    newest, target = checkpoint.newest(config.output_dir / "checkpoints"), config.output_dir / "policy"
    assert newest is not None, "a run ends with a checkpoint"
    partial = target.with_name(".partial_policy")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(newest / "hf", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_config(config: Config, records: Records) -> None:
    """``config.yaml`` of the run; says what a resumed run changes."""
    file = config.output_dir / "config.yaml"
    tree = as_tree(config)
    if file.exists():
        before, now = _flat(yaml.safe_load(file.read_text())), _flat(tree)
        changed = [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in now if before.get(key) != now.get(key)]
        if changed:
            records.note("changed since the last start: " + ", ".join(changed))
    file.write_text(yaml.safe_dump(tree, sort_keys=False))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def prepare_output(config: Config) -> None:
    """Raises ConfigError unless the output folder can be made and written to."""
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=config.output_dir):
            pass
    except OSError as error:
        raise ConfigError([f"output_dir = {config.output_dir}: cannot write there ({error.strerror})"]) from error


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
