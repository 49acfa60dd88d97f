"""Sweeps: all runs of one are checked before the first begins, and each has a folder of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_rl.config.compose import compose_tree, composed, first_line, problems_of, training_config
from sae_rl.config.overrides import SEARCH_PATH, Overrides
from sae_rl.config.schema import Config
from sae_rl.config.search_path import SearchPath
from sae_rl.settings import ConfigError

# A run's folder is inside output_dir. Hydra's own keys for it would leave the runs where they are.
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as Hydra's sweeper gets it."""

    hydra: SearchPath
    folder: Path
    overrides: tuple[str, ...]  # those of hydra.sweeper.params, then those of the command line
    for_hydra: list[str]  # the same, with `++` before values, and what the sweeper itself needs
    varied: frozenset[str]  # keys
    optimises: bool  # the sweeper chooses values by the results of earlier runs, as Optuna does

    @classmethod
    def read(cls, overrides: Sequence[str]) -> Sweep:
        """Raises ConfigError for overrides that cannot be read, and for unknown groups, options and keys."""
        found = Overrides.read(overrides)
        problems = [f"{o.input_line}: write output_dir=..." for o in found.parsed if o.key_or_group in FOLDERS]
        if problems := problems + problems_of(found, "train"):
            raise ConfigError(problems)
        tree = composed(found, "train", RunMode.MULTIRUN)
        sweeper = tree.hydra.sweeper
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        path = _search_path(overrides)
        everything = Overrides.read([*path, *params, *overrides])
        varied, optimises = [o for o in everything.parsed if o.is_sweep_override()], "direction" in sweeper
        intervals = [o.input_line for o in varied if o.is_interval_sweep() and not optimises]
        if intervals:
            raise ConfigError(
                [f"{line}: an interval has no list of values; choose hydra/sweeper=optuna" for line in intervals]
            )
        # What is optimised is a success, and one failed run does not end the others.
        own = {"direction": "maximize", "max_failure_rate": "1.0"}
        return cls(
            found.hydra,
            Path(tree.hydra.sweep.dir),
            (*path, *params, *overrides),
            [
                *(f"hydra.sweeper.{key}={value}" for key, value in own.items() if key in sweeper),
                *everything.forced(),
                *(["hydra.sweeper.params=null"] if params else []),
            ],
            frozenset(override.get_key_element().lstrip("+") for override in varied),
            optimises,
        )


def _search_path(overrides: Sequence[str]) -> list[str]:
    return [line for line in overrides if line.lstrip("+").startswith(SEARCH_PATH)]


def load_sweep(sweep: Sweep) -> list[Config]:
    """Every combination of a sweep (``seed=0,1 algorithm=sae,gae``), before the first one starts.

    A sweep that optimises has no list of runs: each value, or end of an interval, is checked beside the first of the
    others.

    Raises:
        ConfigError: at least one of the runs would be refused.
    """
    found = Overrides.read(sweep.overrides)
    path = _search_path(sweep.overrides)
    choices = [found.alternatives(override) for override in found.parsed]
    if none := [o.input_line for o, values in zip(found.parsed, choices, strict=True) if not values]:
        raise ConfigError([f"{line}: it stands for no value" for line in none])
    if sweep.optimises:
        first = [values[0] for values in choices]
        combinations = [
            [*first[:i], value, *first[i + 1 :]] for i, values in enumerate(choices) for value in values[1:]
        ]
    else:
        combinations = [list(lines) for lines in itertools.product(*choices)]
    return [load_run_of_sweep(compose_tree([*path, *lines]), lines, sweep.varied) for lines in combinations]


def load_run_of_sweep(tree: DictConfig, lines: Sequence[str], varied: Collection[str]) -> Config:
    """One run of a sweep. Its output folder is inside ``output_dir``, named after the overrides that vary.

    Args:
        tree: the composed configuration of the run.
        lines: the run's own overrides.
        varied: the keys that vary.

    Raises:
        ConfigError: the run is refused.
    """
    plain = [re.sub(r"\\(.)", r"\1", line.lstrip("+")) for line in lines]  # Hydra's grammar escapes colons and the like
    names = [line for line in plain if line.partition("=")[0] in varied]
    try:
        OmegaConf.resolve(tree)  # paths below output_dir, such as the base model's, stay those of the sweep
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key}: {first_line(error)}"]) from error
    tree.output_dir = str(Path(tree.output_dir).absolute() / ",".join(sorted(names)))
    return training_config(tree)
