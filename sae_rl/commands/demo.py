"""``sae-rl demo``: makes a base model, trains it, and writes a report.

The demo shows that a policy learns, with the processes that train an 8B model. It does not compare SAE with others.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from sae_rl import checkpoint
from sae_rl.analysis.report import final_table, write_report
from sae_rl.commands.run_folder import publish_policy
from sae_rl.commands.train import run_training
from sae_rl.commands.warm_start import WarmStartConfig, run_warm_start
from sae_rl.config.compose import build, compose_tree, load_config
from sae_rl.config.schema import Config

MINUTES = "about ten minutes"


def run_demo(overrides: list[str]) -> None:
    """Makes the base model, pre-trains the critic, trains with SAE and reports. Finished parts are not repeated."""
    console, started = Console(), time.monotonic()
    folder = Path(compose_tree(["experiment=demo", *overrides]).output_dir)
    console.print(
        f"A small language model learns the task Level in {folder}: {MINUTES} on two cores. Ctrl-C stops it; the same "
        "command continues it.",
        highlight=False,
    )
    base = folder / "base"
    if not base.exists():
        console.rule("1. supervised warm start", align="left")
        run_warm_start(_base_config(base, overrides))
    config = load_config(["experiment=demo", *overrides])
    if not _is_finished(config):
        console.rule("2. reinforcement learning: Ray, vLLM, DeepSpeed", align="left")
        run_training(config)
    elif not (config.output_dir / "policy").is_dir():
        publish_policy(config)  # the run was killed after its last checkpoint, before it published the policy
    console.rule("3. results", align="left")
    console.print(final_table(folder))
    console.print(f"report: {write_run_report(folder)}", highlight=False)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes", highlight=False)


def write_run_report(folder: Path) -> Path:
    """Writes ``report.html`` into a run's folder and returns its path."""
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text())
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    target = folder / "report.html"
    write_report(folder, target, f"sae_rl: {config['name']}", lambda ids: [tokenizer.decode([i]) for i in ids])
    return target


def _base_config(base: Path, overrides: list[str]) -> WarmStartConfig:
    """The base model's seed is the run's, so that five seeds are five independent runs from the start."""
    seed = compose_tree(["experiment=demo", *overrides]).seed
    return build(WarmStartConfig, compose_tree([f"output_dir={base}", f"training.seed={seed}"], "warm_start"))


def _is_finished(config: Config) -> bool:
    newest = checkpoint.newest(config.output_dir / "checkpoints")
    return newest is not None and checkpoint.read_state(newest).step >= config.steps
