"""Hydra's flags on the command line of ``sae-rl``, and what Hydra prints for them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_rl.config.compose import composed, problems_of
from sae_rl.config.overrides import HYDRAS_OWN, MODE, SEARCH_PATH, Overrides
from sae_rl.names import nearest
from sae_rl.settings import ConfigError

REFUSED_FLAGS = {  # a flag of Hydra that sae-rl does not have -> what to do instead
    "config_path": "conf/ of sae_rl is always read; --config-dir DIR adds a folder",
    "config_name": "write the file as DIR/experiment/NAME.yaml with `# @package _global_` in its first line, and run "
    "with --config-dir DIR experiment=NAME",
    "shell_completion": "sae-rl has no completion of its own",
    "experimental_rerun": "output_dir/config.yaml holds the configuration of a run; the same command continues it",
}


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and ``--print``; ``overrides`` holds the other arguments, and ``hydra.searchpath`` for ``--config-dir``.

    Raises:
        ConfigError: a flag that does not exist, that lacks its value, or that sae-rl refuses.
    """
    parser: Any = argparse.ArgumentParser(parents=[get_args_parser()], add_help=False, conflict_handler="resolve")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--print", action="store_true")

    def refuse(message: str) -> NoReturn:
        raise ConfigError([message])

    parser.error = refuse
    flags, unknown = parser.parse_known_intermixed_args(list(arguments))
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    problems = [_unknown_flag(flag, known) for flag in unknown if flag.startswith("-")]
    problems += [
        f"--{name.replace('_', '-')}: {advice}" for name, advice in REFUSED_FLAGS.items() if getattr(flags, name)
    ]
    if problems:
        raise ConfigError(problems)
    if "MULTIRUN" in (line.partition("=")[2] for line in flags.overrides if line.startswith(f"{MODE}=")):
        flags.multirun = True
    flags.overrides = [line for line in flags.overrides if not line.startswith(f"{MODE}=")]
    if flags.config_dir:
        folders = ", ".join(f"'file://{Path(folder).absolute()}'" for folder in flags.config_dir)
        flags.overrides.append(f"{SEARCH_PATH}=[{folders}]")
    return flags  # type: ignore[no-any-return]


def _unknown_flag(flag: str, known: Sequence[str]) -> str:
    key = flag.lstrip("-")
    return (
        f"{flag}: keys have no dashes, write {key}" if "=" in key else f"{flag}: no such flag, {nearest(flag, known)}"
    )


def refuse_sweeps_own(overrides: Sequence[str]) -> None:
    """Raises ConfigError for overrides of Hydra itself that a single run would ignore."""
    keys = [override.key_or_group for override in Overrides.read(overrides).parsed]
    if ours := [key for key in keys if key.startswith(HYDRAS_OWN)]:
        raise ConfigError(
            [f"{key}: only a sweep (-m) reads it; output_dir=... says where a run writes" for key in ours]
        )


def print_for(flags: argparse.Namespace, name: str, before: Sequence[str]) -> bool:
    """Lets Hydra print what ``--cfg``, ``--info``, ``--help`` or ``--hydra-help`` ask for.

    Args:
        name: of ``conf/NAME.yaml``.
        before: overrides that come before those of the flags.

    Returns:
        Whether there was something to print.

    Raises:
        ConfigError: the overrides cannot be read, or a flag does not fit to another.
    """
    wanted = [flag for flag in ("cfg", "info", "help", "hydra_help") if getattr(flags, flag)]
    if (flags.resolve or flags.package) and not flags.cfg:
        raise ConfigError(["--resolve and --package: only --cfg job, hydra or all has them"])
    if not wanted:
        return False
    if len(wanted) + flags.multirun + flags.print > 1:
        raise ConfigError(["only one of --multirun (perhaps with --print), --cfg, --info and --help"])
    found = Overrides.read([*before, *flags.overrides])
    if problems := problems_of(found, name) or found.several_values():
        raise ConfigError(problems)
    tree, lines = composed(found, name), found.forced()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    if flags.help:
        found.hydra.app_help(name, get_args_parser(), argparse.Namespace(overrides=lines, resolve=False))
    elif flags.hydra_help:
        found.hydra.hydra_help(name, get_args_parser(), argparse.Namespace(overrides=[]))
    elif flags.info:
        found.hydra.show_info(flags.info, name, lines)
    else:
        if flags.package not in (None, "_global_") and OmegaConf.select(tree, flags.package) is None:
            raise ConfigError([f"--package {flags.package}: the configuration has no such part"])
        try:
            found.hydra.show_cfg(name, lines, flags.cfg, flags.package, flags.resolve)
        except OmegaConfBaseException as error:
            raise ConfigError([" ".join(str(error).split())]) from error
    return True
