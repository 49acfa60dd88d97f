"""``sae-rl demo``: makes a base model, trains it, and writes a report.

The demo shows that a policy learns, with the processes that train an 8B model. It does not compare SAE with others.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from sae_rl.analysis.report import final_table
from sae_rl.commands.report import REPORT, write_run_report
from sae_rl.commands.run_folder import find_checkpoint, is_finished, publish_policy
from sae_rl.commands.train import run_training
from sae_rl.commands.warm_start import WarmStartConfig, run_warm_start
from sae_rl.config.compose import build, compose_tree, load_config
from sae_rl.settings import ConfigError


def run_demo(overrides: list[str]) -> None:
    """Makes the base model, pre-trains the critic, trains with SAE and reports. Finished parts are not repeated."""
    console, started = Console(), time.monotonic()
    tree = compose_tree(["experiment=demo", *overrides])
    folder = Path(tree.output_dir)
    if tree.dry_run:
        raise ConfigError(["dry_run = true: the demo makes its model first; use `sae-rl train`"])
    console.print(
        f"A small language model learns the task Level in {folder}: about ten minutes on two cores. Ctrl-C stops it; the "
        "same command continues it.",
        highlight=False,
    )
    base = folder / "base"
    if not base.exists():
        console.rule("1. supervised warm start", align="left")
        # The base model's seed is the run's, so that five seeds are five independent runs from the start.
        keys = [f"output_dir={base}", f"training.seed={tree.seed}"]
        run_warm_start(build(WarmStartConfig, compose_tree(keys, "warm_start")))
    config = load_config(["experiment=demo", *overrides])
    is_published = (config.output_dir / "policy").is_dir()
    newest = find_checkpoint(config, verify=not is_published).folder
    if newest is None or not is_finished(config, newest):
        console.rule("2. reinforcement learning: Ray, vLLM, DeepSpeed", align="left")
        run_training(config)
    elif not is_published:
        publish_policy(config, newest)  # the run was killed after its last checkpoint, before it published the policy
    console.rule("3. results", align="left")
    console.print(final_table(folder))
    report = folder / REPORT if (folder / REPORT).is_file() else write_run_report(folder)
    console.print(f"report: {report}", highlight=False)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes", highlight=False)
