"""The command line: ``sae-rl COMMAND [key=value ...]``. Every command takes Hydra overrides.

Imports are inside functions: reward processes import this module too, and a wrong override is reported before Ray and
transformers are loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
PYTHONS = ((3, 11), (3, 12))  # The commands need one; `sae_rl.algo` does not.
EXTRAS = "sae-rl[train-cpu] and sae-rl[train-gpu]"


def train(overrides: list[str]) -> None:
    """train as configured; -m sweeps, --print shows the configuration and an estimate of GPU memory, checks, and stops"""
    from sae_rl.config.compose import load_config

    config = load_config(overrides)
    from sae_rl.commands.train import run_training

    return run_training(config)


def show(overrides: list[str]) -> None:
    """Prints the resolved configuration, for GPUs with an estimate of their memory in comments. Then it checks the rest."""
    import yaml

    from sae_rl.config.compose import load_config
    from sae_rl.config.schema import as_tree
    from sae_rl.settings import ConfigError

    config = load_config(overrides)
    print(yaml.safe_dump(as_tree(config), sort_keys=False), end="")
    if config.cluster.device == "cuda":
        from sae_rl.backends.memory import describe

        for line in describe(config):
            print(f"# {line}")
    from sae_rl.commands.run_folder import find_checkpoint
    from sae_rl.commands.train import prepare_training

    try:
        prepare_training(config, find_checkpoint(config, verify=False))
    except ConfigError:
        print("# No run can start with this configuration: the errors say why.")
        raise


def evaluate(overrides: list[str]) -> None:
    """avg@n, pass@k and maj@n of model.path, a folder or a checkpoint, on task.evaluation"""
    from sae_rl.config.compose import load_evaluation_config

    config = load_evaluation_config(overrides)
    from sae_rl.analysis.evaluation_table import print_evaluation
    from sae_rl.commands.evaluate import run_evaluation

    if folder := run_evaluation(config):
        print_evaluation(folder, plain=config.logger.console != "rich")


def pretrain_critic(overrides: list[str]) -> None:
    """pre-train a critic for model.path that several runs can start from"""
    from sae_rl.config.compose import load_config

    config = load_config(overrides)
    from sae_rl.commands.pretrain_critic import run_critic_pretraining

    if folder := run_critic_pretraining(config):
        print(f"the critic is in {folder}: sae-rl train ... learner.critic_pretraining.checkpoint={folder}")


def correlate(overrides: list[str]) -> None:
    """how well estimators agree with Monte-Carlo advantages, and with their gradient, on a run's checkpoint"""
    from sae_rl.commands.correlate import load_correlation, run_correlation

    config, settings, own = load_correlation(overrides)
    if folder := run_correlation(config, settings, own):
        from sae_rl.correlation.report import write_report
        from sae_rl.records.terminal import console

        page = write_report(
            folder, console(plain=config.logger.console != "rich", quiet=config.logger.console == "off")
        )
        print(f"report: {page}")


def doctor(overrides: list[str]) -> None:
    """try every link that train would use with this configuration, with a tiny model: the first command on a cluster"""
    from sae_rl.config.compose import load_config
    from sae_rl.settings import ConfigError

    config = load_config(overrides)
    if config.dry_run:
        raise ConfigError(["dry_run = true: the doctor starts workers to try them; use `sae-rl train`"])
    from sae_rl.commands.doctor import run_doctor

    if failed := run_doctor(config):
        raise RuntimeError(f"{len(failed)} check(s) failed; docs/clusters.md says what each of them means")


def warm_start(overrides: list[str]) -> None:
    """supervised training of a small base model on a task's demonstrations"""
    from sae_rl.commands.warm_start import WarmStartConfig, run_warm_start
    from sae_rl.config.compose import build, compose_tree

    run_warm_start(build(WarmStartConfig, compose_tree(overrides, "warm_start")))


def prepare_sets(overrides: list[str]) -> None:
    """write DAPO-Math-17k, AIME, AMC and BeyondAIME as published into output_dir, for task=math_sets"""
    from sae_rl.commands.prepare_sets import PrepareConfig, run_preparation
    from sae_rl.config.compose import build, compose_tree

    run_preparation(build(PrepareConfig, compose_tree(overrides, "prepare_sets")))


def demo(overrides: list[str]) -> None:
    """everything on a laptop: base model, training with SAE, report"""
    from sae_rl.commands.demo import run_demo

    run_demo(overrides)


def report(arguments: list[str]) -> None:
    """write report.html of a run's folder"""
    from sae_rl.commands.report import write_run_report
    from sae_rl.commands.run_folder import check_run
    from sae_rl.settings import ConfigError

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError([f"sae-rl report takes the folder of one run, found {arguments}"])
    check_run(Path(arguments[0]))
    print(write_run_report(Path(arguments[0])))


def compare(arguments: list[str]) -> None:
    """compare runs of several seeds: sae-rl compare FOLDERS... writes tables, plots and a page; --help lists its options"""
    from sae_rl.commands.compare import run_comparison

    run_comparison(arguments)


def view(arguments: list[str]) -> None:
    """write a page of a step's responses, token by token: the folder of a run or of correlate, and options (--help)"""
    from sae_rl.commands.view import run_view

    print(run_view(arguments))


# The help of a command is the docstring of its function.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "pretrain-critic": pretrain_critic,
    "correlate": correlate,
    "doctor": doctor,
    "warm-start": warm_start,
    "prepare-sets": prepare_sets,
    "demo": demo,
    "report": report,
    "compare": compare,
    "view": view,
}


FLAGS = """\
  --print              the validated configuration (train); with -m, that of each run
  -m, --multirun       a sweep (train): seed=0,1,2
  --config-dir DIR     adds a folder of configurations of your own, such as DIR/experiment/mine.yaml
  --cfg job|hydra|all  the configuration as Hydra composes it, unchecked; with --resolve, --package PACKAGE
  --info [TOPIC]       how Hydra composes it: all, config, defaults, defaults-tree, plugins, searchpath
  --help               also the groups with their options
"""


def usage() -> str:
    commands = "".join(f"  {name:15} {run.__doc__}\n" for name, run in COMMANDS.items())
    example = "Keys and groups are those of conf/ (Hydra): sae-rl train experiment=demo algorithm=gae seed=1"
    return f"usage: sae-rl COMMAND [key=value ...]\n\n{commands}\n{FLAGS}\n{example}"


def run(name: str, arguments: list[str]) -> None:
    """Runs a command, or prints what a flag of Hydra asks for. Raises ConfigError for flags that do not fit."""
    if name in ("compare", "view"):
        return COMMANDS[name](arguments)
    if name == "report":
        return print(f"sae-rl report: {report.__doc__}\n\n{usage()}") if "--help" in arguments else report(arguments)
    from sae_rl.config.command_line import print_for, read_flags, refuse_sweeps_own
    from sae_rl.settings import ConfigError

    flags = read_flags(arguments)
    overrides = flags.overrides
    if flags.help:
        print(f"sae-rl {name}: {COMMANDS[name].__doc__}\n\n{usage()}\n")
    file = name.replace("-", "_") if name in ("warm-start", "prepare-sets", "correlate") else "train"
    if print_for(flags, file, ["experiment=demo"] * (name == "demo")):
        return None
    if name != "train" and (flags.multirun or flags.print):
        raise ConfigError([f"sae-rl {name} has no --multirun and no --print: they belong to sae-rl train"])
    if not flags.multirun:
        refuse_sweeps_own(overrides)
        return show(overrides) if flags.print else COMMANDS[name](overrides)
    from sae_rl.commands.sweep import run_sweep, show_sweep

    return show_sweep(overrides) if flags.print else run_sweep(overrides)


def main() -> None:
    """Entry point of ``sae-rl``. Exit code 2: the user has to change something; 1: a run failed; 130: interrupted."""
    from sae_rl.garbage import collect_rarely
    from sae_rl.names import nearest

    collect_rarely()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] not in COMMANDS:
        _exit(USAGE_ERROR, f"unknown command {arguments[0]!r}, {nearest(arguments[0], list(COMMANDS))}\n\n{usage()}")
    if sys.version_info[:2] not in PYTHONS:
        found = ".".join(map(str, sys.version_info[:2]))
        _exit(
            USAGE_ERROR, f"error: sae-rl {arguments[0]} needs Python 3.11 or 3.12, found {found}; sae_rl.algo runs here"
        )
    signal.signal(signal.SIGTERM, _interrupt)  # sent by `kill` and by Ray's job manager; the run closes as with Ctrl-C
    try:
        from sae_rl.settings import ConfigError

        run(arguments[0], arguments[1:])
    except ModuleNotFoundError as error:  # first, since ConfigError is not there without pydantic
        _exit(USAGE_ERROR, f"error: {error}; the packages of sae-rl {arguments[0]} come with the extras {EXTRAS}")
    except ConfigError as error:
        _exit(USAGE_ERROR, "\n".join(f"error: {line}" for line in str(error).splitlines()))
    except KeyboardInterrupt:
        _exit(INTERRUPTED, "interrupted; the same command continues from the last checkpoint")
    except Exception as error:
        if os.environ.get("SAE_RL_TRACEBACK"):
            traceback.print_exc()
        _exit(FAILURE, f"error: {error or type(error).__name__}\n(SAE_RL_TRACEBACK=1 shows where)")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _exit(code: int, message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
