"""From the command line's overrides to a validated `Config`: Hydra composes, every mistake gets one readable line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from sae_rl.config.checks import check, check_evaluation
from sae_rl.config.schema import Config
from sae_rl.settings import ConfigError, Section, describe, nearest

T = TypeVar("T", bound=Section)
FREE = {"knobs", "levels", "parts", "verifiers"}  # mappings whose keys a user chooses, or another library

PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())


def load_config(overrides: Sequence[str], name: str = "train") -> Config:
    """The configuration that ``conf/<name>.yaml`` and the overrides make.

    Raises:
        ConfigError: a misspelt key or group, a value of the wrong type or range, or fields that contradict each other.
    """
    return validate(compose_tree(overrides, name))


def load_evaluation_config(overrides: Sequence[str]) -> Config:
    """The same for an evaluation, which needs no training prompts, and no learners that fit them. Raises ConfigError."""
    tree = compose_tree(overrides)
    _leave_out(tree, "train")
    return _checked(tree, check_evaluation)


def check_sweep(overrides: Sequence[str]) -> list[str]:
    """Composes every job of a sweep, before the first one starts.

    Returns:
        The keys that do not vary.

    Raises:
        ConfigError: any of the jobs would be refused.
    """
    parsed = _parse(overrides)
    for job in itertools.product(*map(_tried, parsed)):
        validate(compose_tree(job))
    return [override.key_or_group for override in parsed if not override.is_sweep_override()]


def _tried(override: Override) -> list[str]:
    """What the jobs of a sweep put in its place."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if isinstance(chosen := override.value(), Glob):  # which Hydra itself can only expand while it sweeps
        values = chosen.filter(options_of(override.key_or_group))
    else:
        values = list(override.sweep_string_iterator())
    return [f"{override.get_key_element()}={value}" for value in values]


def options_of(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError([f"cannot read an override: {_first_line(error)}"]) from error


def with_additions(overrides: Sequence[str]) -> list[str]:
    """Overrides with Hydra's ``++`` before keys of free mappings: what these may hold is not in conf/, but checked later.

    Raises:
        ConfigError: an override that cannot be read.
    """
    return [
        f"++{line}" if override.type is OverrideType.CHANGE and set(override.key_or_group.split(".")) & FREE else line
        for line, override in zip(overrides, _parse(overrides), strict=True)
    ]


def compose_tree(overrides: Sequence[str], name: str = "train") -> DictConfig:
    """What Hydra makes of the overrides, unresolved.

    Raises:
        ConfigError: an override that cannot be read, or that names no group, option or key.
    """
    overrides = with_additions(overrides)
    parsed = _parse(overrides)
    # Files in folders named base are what options share, and no choice.
    groups = {str(folder.relative_to(CONF)) for folder in CONF.rglob("*") if folder.is_dir() and folder.name != "base"}
    choices = [override for override in parsed if _group_of(override) in groups]
    problems = [problem for override in choices if (problem := _check_choice(override)) is not None]
    if problems:
        raise ConfigError(problems)
    with _hydra():
        try:
            chosen = compose(name, overrides=[str(override.input_line) for override in choices])
            values = [override for override in parsed if override not in choices]
            problems = [problem for value in values if (problem := _check_key(value, chosen, groups)) is not None]
            if problems:
                raise ConfigError(problems)
            return compose(name, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([_first_line(error.__cause__ or error)]) from error


def validate(tree: DictConfig) -> Config:
    """The frozen, typed configuration of a training run, its fields checked against each other.

    Raises:
        ConfigError: every problem that was found.
    """
    if not tree.evaluation.every_steps:
        _leave_out(tree, "evaluation")
    return _checked(tree, check)


def _leave_out(tree: DictConfig, source: str) -> None:
    """A source that is not used need not be described."""
    if OmegaConf.missing_keys(tree.task[source] or {}):
        tree.task[source] = None


def _checked(tree: DictConfig, checks: Callable[[Config], list[str]]) -> Config:
    config = build(Config, tree)
    if problems := checks(config):
        raise ConfigError(problems)
    return config


def build(kind: type[T], tree: DictConfig) -> T:
    """A typed section from what Hydra composed. Raises ConfigError."""
    try:
        if missing := sorted(OmegaConf.missing_keys(tree)):
            raise ConfigError([f"{key} has no value; give it one on the command line: {key}=..." for key in missing])
        return kind.model_validate(OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key}: {_first_line(error)}"]) from error
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


class _hydra:
    """Hydra keeps one global configuration source; this one is set for a composition and left as it was found."""

    def __enter__(self) -> None:
        self._before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        initialize_config_dir(str(CONF), version_base="1.3")

    def __exit__(self, *_: object) -> None:
        GlobalHydra.instance().clear()
        if self._before is not None:
            GlobalHydra.instance().initialize(self._before)


def _group_of(override: Override) -> str:
    return override.key_or_group


def _check_choice(override: Override) -> str | None:
    """A group's option must be a file; ``~group`` leaves a group out."""
    option = override.value()
    if override.is_delete() or override.is_sweep_override():
        return None
    options = options_of(override.key_or_group)
    if str(option) in options:
        return None
    return f"{override.input_line}: no such option, {nearest(str(option), options)}"


def _check_key(override: Override, tree: DictConfig, groups: set[str]) -> str | None:
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or override.is_delete() or key.startswith("hydra"):
        return None  # Hydra adds or deletes; the typed tree refuses what it does not know
    node: Any = tree
    for depth, part in enumerate(key.split(".")):
        if not isinstance(node, DictConfig):
            return f"{key}: {'.'.join(key.split('.')[:depth])} is a value, it has no key {part!r}"
        if part not in list(node.keys()):  # `in` would deny a key whose value is still missing
            prefix = ".".join(key.split(".")[:depth])
            allowed = [str(name) for name in node if name != "hydra"] + ([] if depth else sorted(groups))
            where = f"{prefix} has no key" if prefix else "there is no key or group"
            return f"{key}: {where} {part!r}, {nearest(part, allowed)}"
        node = node._get_node(part)
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
