"""``sae-rl correlate``: how well estimators agree with Monte-Carlo advantages, on a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf, open_dict

from sae_rl import checkpoint
from sae_rl.commands.assemble import assembled
from sae_rl.commands.preflight import Ready, check_critic, prepared, show_outline, with_delimiters
from sae_rl.commands.run_folder import CONFIG, check_run
from sae_rl.config.compose import build, compose_tree, recorded_tree, training_config
from sae_rl.config.schema import AlgorithmConfig, Config, as_tree, flat
from sae_rl.correlation.files import TENSORS
from sae_rl.correlation.measure import Measuring, measure
from sae_rl.correlation.settings import CorrelateConfig, CorrelationConfig, chosen
from sae_rl.digests import digests_of
from sae_rl.driver import restore
from sae_rl.run_lock import locked
from sae_rl.settings import ConfigError
from sae_rl.workers.table import roles_of

FOLDER, SETTINGS = "correlation", "correlation.yaml"
WEIGHTS = (".safetensors", ".bin", ".json")  # endings of the files that say what a model computes
FREE = ("cluster.", "logger.", "rewards.num_processes", "dry_run", "output_dir")  # keys that may change between starts


def load_correlation(overrides: Sequence[str]) -> tuple[Config, CorrelationConfig, dict[str, Any]]:
    """The configuration of the checkpoint's run with the overrides, the settings, and these as plain values
    with the checksums of the weights.

    ``output_dir`` is the folder that is written: ``correlation/step_000020`` in the folder of the run, unless overridden.

    Raises:
        ConfigError: there is no such checkpoint, or the configuration is wrong.
    """
    tree = compose_tree(overrides, "correlate")
    given, folder = OmegaConf.select(tree, "correlation.checkpoint"), None
    if given is not None:
        folder = _newest(Path(str(given)))
        recorded = yaml.safe_load((folder.parents[1] / CONFIG).read_text())
        recorded["output_dir"] = str(folder.parents[1] / FOLDER / folder.name)
        tree = recorded_tree(recorded, overrides, "correlate")
        tree.correlation.checkpoint = str(folder)
    elif not any(line.startswith("output_dir=") for line in overrides):
        tree.output_dir = str(Path(tree.output_dir) / FOLDER / "start")
    own = {"correlation": OmegaConf.to_container(tree.correlation, resolve=True)}
    with open_dict(tree):
        del tree["correlation"]
    settings = build(CorrelateConfig, OmegaConf.create(own)).correlation
    config = _frozen(training_config(tree), settings)
    return config, settings, own | {"weights": _weights(config, settings)}


def _weights(config: Config, settings: CorrelationConfig) -> dict[str, str]:
    """SHA-256 of the weights by the key that names them: of a checkpoint's manifest, or of the files of model folders."""
    if settings.checkpoint is not None:
        found = {"correlation.checkpoint": [settings.checkpoint / checkpoint.MANIFEST]}
    else:
        critic = config.learner.critic_pretraining.checkpoint
        named = {"model.path": config.model.path, "learner.critic_pretraining.checkpoint": critic}
        folders = {key: Path(path) for key, path in named.items() if path is not None and Path(path).is_dir()}
        found = {key: [one for one in folder.iterdir() if one.suffix in WEIGHTS] for key, folder in folders.items()}
    contents = {key: sorted((Path(name).name, *one) for name, one in digests_of(found[key]).items()) for key in found}
    return {key: hashlib.sha256(repr(files).encode()).hexdigest() for key, files in contents.items()}


def _newest(folder: Path) -> Path:
    """A checkpoint, or the newest intact one of a run's folder. Raises ConfigError if there is none."""
    folder = folder.absolute()
    if (folder / "driver.json").is_file():
        if found := checkpoint.damages_of(folder):
            raise ConfigError([f"correlation.checkpoint = {folder} is damaged: {found[0]}"])
        check_run(folder.parent.parent)
        return folder
    check_run(folder)
    if (newest := checkpoint.newest_intact(folder / "checkpoints")[0]) is None:
        raise ConfigError([f"correlation.checkpoint = {folder}: the run has no intact checkpoint"])
    return newest


def _frozen(config: Config, settings: CorrelationConfig) -> Config:
    """The configuration of a run that samples from its policy as in training, computes everything, and updates nothing.

    Raises:
        ConfigError: the policy's return, critic or gradient cannot be compared with that of continuations.
    """
    algorithm, key, problems = config.algorithm, "correlation.gradient_dimension", []
    if algorithm.token_rewards.kl_coef > 0:
        problems.append("algorithm.token_rewards.kl_coef > 0: continuations have no KL penalty; override it with 0")
    if algorithm.bootstrap_truncated:
        found = "algorithm.bootstrap_truncated = true: continuations count the rewards of cut responses"
        problems.append(f"{found}; override it with false")
    if (gamma := getattr(algorithm.estimator, "gamma", 1.0)) != 1:
        found = f"algorithm.estimator.gamma = {gamma:g}: returns of continuations are undiscounted"
        problems.append(f"{found}; override it with 1, which takes the critic's values as they are")
    if config.rollout.first_responses is not None:
        found = f"rollout.first_responses = {config.rollout.first_responses}: no response branches from another here"
        problems.append(f"{found}; override it with null")
    if settings.gradient_dimension and config.learner.policy.zero_stage == 3:
        found = (
            f"{key} = {settings.gradient_dimension}: under learner.policy.zero_stage = 3 no rank holds whole weights"
        )
        problems.append(f"{found}; use {key}=0, or a policy of stage 0, 1 or 2")
    if settings.checkpoint is None and algorithm.needs_critic and not config.learner.critic_pretraining.checkpoint:
        found = "the critic is not trained: name a run in correlation.checkpoint, a critic in"
        problems.append(f"{found} learner.critic_pretraining.checkpoint, or choose algorithm=grpo")
    if problems:
        raise ConfigError(problems)
    # Entropies are computed for segmenters and for the records; a loss that reads them has workers compute them.
    loss = replace(algorithm.policy_loss, kl_coef=0.0, entropy_coef=1.0)
    quiet: dict[str, Any] = {"jsonl": False, "tensorboard": False, "rollouts_every_steps": 0}
    quiet["wandb"] = config.logger.wandb.model_copy(update={"mode": "off"})
    console = "off" if config.logger.console == "off" else "plain"
    return config.model_copy(
        update={
            "replay": None,
            "algorithm": algorithm.model_copy(update={"policy_loss": loss}),
            "schedule": config.schedule.model_copy(update={"mode": "synchronous"}),
            "rollout": config.rollout.model_copy(update={"group_size": settings.responses_per_prompt}),
            "evaluation": config.evaluation.model_copy(
                update={"every_steps": 1}
            ),  # loads the prompts of task.evaluation
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": 0}),
            "logger": config.logger.model_copy(update=quiet | {"console": console}),
        }
    )


def run_correlation(config: Config, settings: CorrelationConfig, own: dict[str, Any]) -> Path | None:
    """Measures the estimators of ``settings`` on a checkpoint; a second start continues what was killed.

    Args:
        own: ``settings`` as plain values, and the checksums of the weights.

    Returns:
        The folder with the measurements, ``output_dir``; None with ``dry_run``.

    Raises:
        ConfigError: as in `run_training`; or the folder has measurements with other settings.
        WorkerError, RuntimeError: measuring failed; the next start continues.
    """
    algorithms, lacking = chosen(settings, config)
    if config.task.evaluation is None:
        raise ConfigError(["task.evaluation = null: it says which prompts are measured"])
    _check_same(config, own)
    ready = prepared(config, roles_of(config), resume_from=settings.checkpoint, more=(lambda: check_critic(config),))
    if len(ready.heldout) < settings.num_prompts:
        found = (
            f"correlation.num_prompts = {settings.num_prompts}, but task.evaluation has {len(ready.heldout)} prompts"
        )
        raise ConfigError([found])
    algorithms, notes = _resolved(algorithms, settings, ready)
    if lacking:
        notes.append(f"left out, since this run has no critic: {', '.join(lacking)}")
    ready = replace(ready, notes=[*ready.notes, *notes])
    if config.dry_run:
        show_outline(ready)
        print("  " + _most(config, settings))
        return None
    folder = config.output_dir
    if (folder / TENSORS).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(yaml.safe_dump(own, sort_keys=False))
    with locked(folder), assembled(ready) as run:
        run.workers.sync_weights(restore(run))
        measure(Measuring(run=run, settings=settings, algorithms=algorithms, lacking=lacking, folder=folder))
    return folder


def _resolved(
    algorithms: dict[str, AlgorithmConfig], settings: CorrelationConfig, ready: Ready
) -> tuple[dict[str, AlgorithmConfig], list[str]]:
    """The algorithms with token ids of delimiters, and a note about those whose delimiter no token has.

    Raises:
        ConfigError: another setting needs the segments of one of these.
    """
    found, notes, needed = {}, [], {*settings.boundaries, *settings.matched_to.values()}
    for name, algorithm in algorithms.items():
        try:
            own = ready.config.model_copy(update={"algorithm": algorithm})
            found[name] = with_delimiters(own, ready.tokenizer).algorithm
        except ConfigError as error:
            if name in needed:
                raise
            notes.append(f"left out: {name}, {error}")
    return found, notes


def _most(config: Config, settings: CorrelationConfig) -> str:
    """What sampling costs at most, before lengths are known."""
    limit = config.rollout.max_response_tokens
    num_responses = settings.num_prompts * settings.responses_per_prompt
    places = min(1.0, 2 / settings.every) * limit
    return (
        f"tokens: at most {num_responses * limit:,} of responses and {num_responses * places * limit / 2 * settings.k:,.0f} "
        "of continuations from neutral places, if every response had rollout.max_response_tokens"
    )


def _check_same(config: Config, own: dict[str, Any]) -> None:
    """Raises ConfigError if the folder was begun with other settings or weights, or is that of a run."""
    folder = config.output_dir
    if (folder / CONFIG).exists() and not (folder / SETTINGS).exists():
        raise ConfigError([f"output_dir = {folder} holds a run; choose another output_dir"])
    if not (folder / SETTINGS).exists() or not (folder / CONFIG).exists():
        return
    before = yaml.safe_load((folder / CONFIG).read_text()) | yaml.safe_load((folder / SETTINGS).read_text())
    then, now = flat(before), flat(as_tree(config) | own)
    changed = [
        f"{key}: {then.get(key)!r} -> {now.get(key)!r}"
        for key in {**then, **now}
        if then.get(key) != now.get(key) and not key.startswith(FREE)
    ]
    if changed:
        found = f"output_dir = {folder} holds measurements with other settings: {', '.join(changed)}"
        raise ConfigError([f"{found}; choose another output_dir"])
