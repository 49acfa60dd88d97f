"""From the overrides of the command line to a validated `Config`: Hydra composes, pydantic checks.

Every value override goes to Hydra as ``++key=value``, so keys that ``conf/`` does not have reach the typed tree. It
refuses unknown keys, and its message names the nearest key that exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from sae_rl.config.checks import check, check_evaluation
from sae_rl.config.overrides import Overrides, no_such_key
from sae_rl.config.schema import Config
from sae_rl.config.search_path import CONF, GROUPS
from sae_rl.config.trial import try_plug_ins
from sae_rl.names import nearest
from sae_rl.settings import ConfigError, Section, describe

T = TypeVar("T", bound=Section)


def load_config(overrides: Sequence[str]) -> Config:
    """The configuration of a training run: ``conf/train.yaml`` with the overrides.

    Raises:
        ConfigError: every misspelt key or group, every value of the wrong type or range, every contradiction; a plug-in
            that fails on made-up data.
    """
    return training_config(compose_tree(overrides))


def load_evaluation_config(overrides: Sequence[str]) -> Config:
    """The configuration of an evaluation, which needs no training prompts and checks no learner. Raises ConfigError."""
    tree = compose_tree(overrides)
    _drop_unfinished_source(tree, "train")
    return _checked(tree, check_evaluation)


def compose_tree(overrides: Sequence[str], name: str = "train") -> DictConfig:
    """The tree that Hydra composes, with its interpolations unresolved.

    Raises:
        ConfigError: an override that Hydra cannot read or apply, or an unknown group, option or first word of a key.
    """
    found = Overrides.read(overrides)
    if problems := problems_of(found, name) or found.several_values():
        raise ConfigError(problems)
    tree = composed(found, name)
    with open_dict(tree):
        del tree["hydra"]
    return tree


def recorded_tree(recorded: Mapping[str, Any], overrides: Sequence[str], name: str) -> DictConfig:
    """The tree of ``conf/NAME.yaml`` with a run's recorded configuration in place of its defaults, and under the overrides.

    Raises:
        ConfigError: as `compose_tree`; or an override that removes a key, or that has no place of its own.
    """
    plain: Any = OmegaConf.to_container(compose_tree(overrides, name))
    tree, found = OmegaConf.create(dict(recorded)), Overrides.read(overrides)
    for override in found.parsed:
        key = override.key_or_group
        if override.is_delete() or key == "experiment":
            raise ConfigError(
                [f"{override.input_line}: a recorded configuration takes key=value and GROUP=option alone"]
            )
        if found.is_group(key):
            chosen = plain
            for part in key.split("/"):
                chosen = chosen[part]
            OmegaConf.update(tree, key.replace("/", "."), chosen, merge=False)
        elif key.split(".")[0] in recorded:
            OmegaConf.update(tree, key, override.value(), merge=True, force_add=True)
    return OmegaConf.create({**plain, **tree})


def problems_of(found: Overrides, name: str) -> list[str]:
    """A line for each unknown group, option and first word of a key in overrides of ``conf/NAME.yaml``."""
    file: Any = OmegaConf.load(CONF / f"{name}.yaml")
    defaults = file.get("defaults", [])
    groups = sorted(GROUPS) if defaults else []
    files = [
        file,
        *(OmegaConf.load(CONF / f"{each}.yaml") for each in defaults if isinstance(each, str) and each != "_self_"),
    ]
    known = {*(str(key) for each in files for key in each), *groups} - {"defaults", "hydra"}
    unknown = found.unknown_keys(known)
    paths = [*groups, *default_paths(name)] if unknown else []
    return found.problems() + [no_such_key(override, known, paths) for override in unknown]


def composed(found: Overrides, name: str, mode: RunMode = RunMode.RUN) -> DictConfig:
    """The tree with Hydra's own part in ``hydra``. Raises ConfigError if Hydra cannot apply an override or read a file."""
    try:
        return found.hydra.compose_config(name, found.forced(), mode, from_shell=False)
    except YAMLError as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    except MissingConfigException as error:  # an option that a file of the user chooses
        hint = f", {nearest(Path(str(error.missing_cfg_file)).name, error.options)}" if error.options else ""
        raise ConfigError([f"{first_line(error)}{hint}"]) from error
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError([first_line(error.__cause__ or error)]) from error


@cache
def default_paths(name: str = "train") -> tuple[str, ...]:
    """The full path of every key of ``conf/NAME.yaml`` and its default groups, such as ``rollout.group_size``."""

    def below(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, Mapping):
                yield from below(value, f"{prefix}{key}.")

    tree: Any = OmegaConf.to_container(compose_tree([], name))
    return tuple(below(tree))


def build(kind: type[T], tree: DictConfig) -> T:
    """A typed section from the tree that Hydra composed.

    Raises:
        ConfigError: missing values, unknown keys, and values of the wrong type or range.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(tree)):
            raise ConfigError([f"{key} has no value; give it one on the command line: {key}=..." for key in missing])
        return kind.model_validate(OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key}: {first_line(error)}"]) from error
    except ValidationError as error:
        paths = default_paths() if kind is Config else ()
        raise ConfigError(describe(error, kind, paths)) from error


def training_config(tree: DictConfig) -> Config:
    """The configuration of a training run from its tree. Raises ConfigError as `load_config`."""
    if not OmegaConf.select(tree, "evaluation.every_steps"):
        _drop_unfinished_source(tree, "evaluation")
    return _checked(tree, check)


def _drop_unfinished_source(tree: DictConfig, name: str) -> None:
    """Sets ``task.train`` or ``task.evaluation`` to null if one of its keys has no value: it is not used."""
    source = OmegaConf.select(tree, f"task.{name}")
    if isinstance(source, DictConfig) and OmegaConf.missing_keys(source):
        tree.task[name] = None


def _checked(tree: DictConfig, checks: Callable[[Config], list[str]]) -> Config:
    config = build(Config, tree)
    if problems := checks(config) or try_plug_ins(config):
        raise ConfigError(problems)
    return config


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
