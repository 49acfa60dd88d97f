"""From the overrides of the command line to a validated `Config`: Hydra composes, pydantic checks.

Every value override goes to Hydra as ``++key=value``, so keys that ``conf/`` does not have reach the typed tree. It
refuses unknown keys, and its message names the nearest key that exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

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
from sae_rl.config.trial import try_plug_ins
from sae_rl.names import nearest
from sae_rl.settings import ConfigError, Section, describe

T = TypeVar("T", bound=Section)

# A wheel has conf/ inside the package, a checkout has it beside the package.
CONF = next(folder / "conf" for folder in Path(__file__).parents[1:3] if (folder / "conf").is_dir())
# A folder named base holds what the options of its group share, and is no group.
GROUPS = {str(folder.relative_to(CONF)) for folder in CONF.rglob("*") if folder.is_dir() and folder.name != "base"}
HYDRAS_OWN = ("hydra/", "hydra.")  # overrides of Hydra itself, such as hydra/launcher=joblib


def load_config(overrides: Sequence[str]) -> Config:
    """The configuration of a training run: ``conf/train.yaml`` with the overrides.

    Raises:
        ConfigError: every misspelt key or group, every value of the wrong type or range, every contradiction; a plug-in
            that fails on made-up data.
    """
    return _training_config(compose_tree(overrides))


def load_evaluation_config(overrides: Sequence[str]) -> Config:
    """The configuration of an evaluation, which needs no training prompts and checks no learner. Raises ConfigError."""
    tree = compose_tree(overrides)
    _drop_unfinished_source(tree, "train")
    return _checked(tree, check_evaluation)


def load_sweep(overrides: Sequence[str]) -> list[Config]:
    """Every combination of a sweep (``seed=0,1 algorithm=sae,gae``), before the first one starts.

    Raises:
        ConfigError: at least one of the runs would be refused.
    """
    combinations = itertools.product(*map(_alternatives, _parse(overrides)))
    return [load_run_of_sweep(compose_tree(lines), lines, overrides) for lines in combinations]


def load_run_of_sweep(tree: DictConfig, lines: Sequence[str], overrides: Sequence[str]) -> Config:
    """One run of a sweep. Its output folder is inside ``output_dir``, named after the overrides that vary.

    Args:
        tree: the composed configuration of the run.
        lines: the run's own overrides.
        overrides: the overrides of the whole sweep.

    Raises:
        ConfigError: the run is refused.
    """
    varied = {override.get_key_element().lstrip("+") for override in _parse(overrides) if override.is_sweep_override()}
    names = [line.lstrip("+") for line in lines if line.lstrip("+").partition("=")[0] in varied]
    try:
        OmegaConf.resolve(tree)  # paths below output_dir, such as the base model's, stay those of the sweep
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key}: {_first_line(error)}"]) from error
    tree.output_dir = str(Path(tree.output_dir).absolute() / ",".join(sorted(names)))
    return _training_config(tree)


def _alternatives(override: Override) -> list[str]:
    """The overrides that stand for this one in the runs of a sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    chosen, options = override.value(), _options_of(override.key_or_group)
    values = chosen.filter(options) if isinstance(chosen, Glob) else list(override.sweep_string_iterator())
    return [f"{override.get_key_element()}={value}" for value in values]


def compose_tree(overrides: Sequence[str], name: str = "train") -> DictConfig:
    """The tree that Hydra composes, with its interpolations unresolved.

    Raises:
        ConfigError: an override that Hydra cannot read or apply, or an unknown group or option.
    """
    file = OmegaConf.load(CONF / f"{name}.yaml")
    known = {*map(str, file), *(GROUPS if "defaults" in file else ())} - {"defaults", "hydra"}
    if problems := [problem for override in _parse(overrides) if (problem := _misspelt(override, known))]:
        raise ConfigError(problems)
    before = GlobalHydra.instance().hydra  # a caller may use Hydra, too
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(name, overrides=forced(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_first_line(error.__cause__ or error)]) from error
    finally:
        GlobalHydra.instance().hydra = before


def forced(overrides: Sequence[str]) -> list[str]:
    """The overrides with Hydra's ``++`` before every value, so that pydantic judges keys that ``conf/`` does not have."""
    lines = []
    for override in _parse(overrides):
        key = override.key_or_group
        is_value = override.type is OverrideType.CHANGE and key not in GROUPS and not key.startswith(HYDRAS_OWN)
        lines.append(f"++{override.input_line}" if is_value else str(override.input_line))
    return lines


def _options_of(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError([f"cannot read an override: {_first_line(error)}"]) from error


def _misspelt(override: Override, known: set[str]) -> str | None:
    """What is wrong with a group, its option or a key at the top. The typed tree judges deeper keys."""
    key, option = override.key_or_group, override.value()
    if key.startswith(HYDRAS_OWN):
        return None
    if key not in GROUPS:
        top = key.split(".")[0]
        return None if top in known else f"{key}: the configuration has no {top!r}, {nearest(top, known)}"
    if override.is_delete() or override.is_sweep_override() or str(option) in _options_of(key):
        return None
    return f"{override.input_line}: no such option, {nearest(str(option), _options_of(key))}"


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
        raise ConfigError([f"{error.full_key}: {_first_line(error)}"]) from error
    except ValidationError as error:
        raise ConfigError(describe(error, kind)) from error


def _training_config(tree: DictConfig) -> Config:
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
