"""``sae-rl train -m``: the runs of a sweep, one after the other or as Hydra's launcher starts them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sae_rl.commands.run_folder import find_checkpoint, is_finished, publish_policy
from sae_rl.config.schema import Config, as_tree, flat
from sae_rl.config.sweeps import Sweep, load_run_of_sweep, load_sweep
from sae_rl.records.records import read_jsonl
from sae_rl.settings import ConfigError

if TYPE_CHECKING:
    from sae_rl.workers.session import Session

OBJECTIVE = "evaluation/success_mean"
FAILED = "failed_jobs.txt"
RESULTS = "optimization_results.yaml"  # written by Optuna's sweeper


def run_sweep(overrides: Sequence[str]) -> None:
    """Trains every run of a sweep. A run that fails is one line, and the others go on.

    Raises:
        ConfigError: a run would be refused; none was started.
        RuntimeError: runs failed.
    """
    sweep = Sweep.read(overrides)
    configs = load_sweep(sweep)
    if sweep.optimises and not all(config.evaluation.every_steps and config.logger.jsonl for config in configs):
        raise ConfigError(
            [
                "this sweeper maximises the last held-out success: set evaluation.every_steps above 0, and logger.jsonl=true"
            ]
        )
    failed, varied, optimises = sweep.folder.absolute() / FAILED, sweep.varied, sweep.optimises
    failed.unlink(missing_ok=True)
    from sae_rl.workers.session import Session  # takes seconds, which a refused sweep does not wait for

    session, process = Session(), os.getpid()

    def job(tree: DictConfig) -> float | None:  # perhaps in another process
        lines = HydraConfig.get().overrides.task
        name = ",".join(lines)
        try:
            config = load_run_of_sweep(tree, lines, varied)
            name = str(config.output_dir)
            _train(config, session if os.getpid() == process else None)
            return last_success(config) if optimises else None
        except Exception as error:
            if os.environ.get("SAE_RL_TRACEBACK"):
                traceback.print_exc()
            _note_failure(failed, f"{name}: {'; '.join(str(error).splitlines()) or type(error).__name__}")
            return None

    try:
        sweep.hydra.multirun("train", job, sweep.for_hydra)
    except ValueError:  # Optuna has no best run if all failed
        if not failed.exists():
            raise
    finally:
        session.close()
    if (results := sweep.folder / RESULTS).exists():
        print(f"{results}:\n{results.read_text()}", end="")
    if failed.exists():
        raise RuntimeError(f"{len(failed.read_text().splitlines())} job(s) of the sweep failed: {failed} names them")


def show_sweep(overrides: Sequence[str]) -> None:
    """Prints the first configuration of a sweep, and for each other one the keys that differ. Raises ConfigError."""
    trees = [as_tree(config) for config in load_sweep(Sweep.read(overrides))]
    first = flat(trees[0])
    print(f"# 1 of {len(trees)}", yaml.safe_dump(trees[0], sort_keys=False), sep="\n", end="")
    for number, tree in enumerate(map(flat, trees[1:]), 2):
        changed = {key: tree.get(key) for key in first | tree if tree.get(key) != first.get(key)}
        print("---", f"# {number} of {len(trees)}: what differs from the first", sep="\n")
        print(yaml.safe_dump(changed, sort_keys=False), end="")


def _train(config: Config, session: Session | None) -> None:
    """Trains, unless this very run is finished: a sweep that is started again goes on where it was."""
    from sae_rl.commands.train import run_training

    is_published, written = (config.output_dir / "policy").is_dir(), config.output_dir / "config.yaml"
    newest = find_checkpoint(config, verify=not is_published).folder
    is_same = written.exists() and written.read_text() == yaml.safe_dump(as_tree(config), sort_keys=False)
    if newest is None or not is_same or not is_finished(config, newest):
        return run_training(config, session)
    if not is_published:
        publish_policy(config, newest)
    print(f"{config.output_dir}: finished before")


def last_success(config: Config) -> float:
    """The last held-out success of a run. Raises ValueError if it has none."""
    rows = read_jsonl(config.output_dir / "metrics.jsonl")
    values = [row[OBJECTIVE] for row in rows if row.get(OBJECTIVE) is not None]
    if not values:
        raise ValueError(f"no {OBJECTIVE} in metrics.jsonl")
    return float(values[-1])


def _note_failure(file: Path, line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(line + "\n")
