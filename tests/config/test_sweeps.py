"""Sweeps, and keys that conf/ does not have: each job is what the command line says, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_rl import checkpoint
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config, as_tree
from sae_rl.config.search_path import SearchPath
from sae_rl.config.sweeps import Sweep, load_sweep
from sae_rl.settings import ConfigError

from ..conftest import CommandLine
from .refused import assert_refused

MODEL = ("model.path=nobody/nothing", "model.context_tokens=1024")


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(
    flag: str, sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configs: list[Config] = []
    monkeypatch.setattr("sae_rl.commands.train.run_training", lambda config, _: configs.append(config))
    swept = sae_rl("train", flag, *MODEL, "algorithm=sae,gae", "seed=0,1", "name=sweep", "steps=3")
    assert (swept.code, swept.stderr) == (0, "")
    found = [(as_tree(config)["algorithm"]["estimator"]["name"], config.seed) for config in configs]
    assert found == [("sae", 0), ("sae", 1), ("gae", 0), ("gae", 1)]
    folders = [config.output_dir for config in configs]
    assert folders == [tmp_path / f"outputs/sweep/algorithm={a},seed={s}" for a in ("sae", "gae") for s in (0, 1)]


def test_the_folder_of_a_value_with_a_colon_has_no_backslash() -> None:
    """Hydra's grammar escapes it in the overrides of the runs."""
    rewards = "task.train.reward=tests.stack.rewards:parity,tests.stack.rewards:remainder"
    configs = load_sweep(Sweep.read([*MODEL, rewards, "rollout.max_response_tokens=64", "name=sweep"]))
    folders = [config.output_dir.name for config in configs]
    assert folders == [f"task.train.reward=tests.stack.rewards:{name}" for name in ("parity", "remainder")]


def test_a_sweep_of_the_demo_starts_from_its_base_model_and_writes_where_it_is_told(
    sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    configs: list[Config] = []
    monkeypatch.setattr("sae_rl.commands.train.run_training", lambda config, _: configs.append(config))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "base").symlink_to(tiny_model)
    swept = sae_rl("train", "-m", "experiment=demo", "algorithm=glob(*ae)", "output_dir=mine")
    assert (swept.code, swept.stderr) == (0, "")
    names = ("gae", "length_adaptive_gae", "sae", "segment_adaptive_sae", "segment_gae", "turn_gae")
    folders = [tmp_path / f"mine/algorithm={name}" for name in names]
    assert [config.output_dir for config in configs] == folders
    assert {config.model.path for config in configs} == {"mine/base"}


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("algorithm=sae,gea", ("algorithm=gea", "did you mean 'gae'?")),
        ("algorithm.estimator.lamb=0.5,0.9", ("algorithm.estimator", "'lamb'", "did you mean 'lam'?")),
        ("algorithm.estimator.lam=0.5,1.5", ("lam = 1.5", "[0, 1]")),
        ("algorithm/segmenter=random,fixd_length", ("fixd_length", "did you mean 'fixed_length'?")),
    ],
)
def test_a_sweep_with_a_mistake_does_not_begin(
    override: str, fragments: tuple[str, ...], sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Config] = []
    monkeypatch.setattr("sae_rl.commands.train.run_training", lambda config, _: runs.append(config))
    outcome = sae_rl("train", "-m", *MODEL, override)
    assert (outcome.code, runs) == (2, [])
    for fragment in fragments:
        assert fragment in outcome.stderr


def test_a_sweep_is_loaded_before_it_begins() -> None:
    configs = load_sweep(Sweep.read([*MODEL, "algorithm=sae,gae", "rollout.group_size=4,8", "name=sweep"]))
    assert [config.rollout.group_size for config in configs] == [4, 8, 4, 8]
    assert configs[1].output_dir == Path.cwd() / "outputs/sweep/algorithm=sae,rollout.group_size=8"
    with pytest.raises(ConfigError, match="rollout has no 'group_sze', did you mean 'group_size'"):
        load_sweep(Sweep.read([*MODEL, "rollout.group_sze=4,8"]))


def test_a_run_that_fails_does_not_end_the_sweep(sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def fail(config: Config, _: Any) -> None:
        seeds.append(config.seed)
        if config.seed < 2:
            raise RuntimeError(f"seed {config.seed}")

    monkeypatch.setattr("sae_rl.commands.train.run_training", fail)
    outcome = sae_rl("train", "-m", *MODEL, "seed=0,1,2")
    assert (outcome.code, seeds) == (1, [0, 1, 2])
    assert [line.rsplit("/", 1)[-1] for line in outcome.lines[:2]] == ["seed=0: seed 0", "seed=1: seed 1"]
    assert outcome.lines[2].startswith("error: 2 job(s) of the sweep failed: ")
    failed = Path("outputs/run/failed_jobs.txt").read_text().splitlines()
    assert [line.rsplit("/", 1)[-1] for line in failed] == ["seed=0: seed 0", "seed=1: seed 1"]


def test_a_sweep_uses_the_launcher_that_hydra_is_told(sae_rl: CommandLine) -> None:
    outcome = sae_rl("train", "-m", *MODEL, "seed=0,1", "hydra/launcher=nowhere")
    assert_refused(outcome, "hydra/launcher=nowhere", "allowed: basic")


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.train.knobs={need: 3}"],
        ["task.train.knobs.need=3"],
        ["task=reasoning_gym", "task.train.knobs={min_terms: 3}", "task.train.levels.num_digits=1"],
        ["task=reasoning_gym", "task.train.template='Q: {prompt}'", "task.evaluation.levels={num_terms: 1}"],
        ["rewards.verifiers={strict: {name: math, boxed_only: true}}", "task.train.reward=strict"],
        [
            "task=mixture",
            "task.train.parts={more: {name: level, num_prompts: 5}}",
            "task.train.parts.gsm8k.path=a.jsonl",
        ],
        ["task=mixture", "~task.train.parts.gsm8k", "task.train.parts.chains.knobs.min_terms=3"],
    ],
)
def test_free_mappings_are_set_on_the_command_line_like_other_keys(
    overrides: list[str], sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [override.removeprefix("~").partition("=") for override in overrides if "." in override]
    tree = as_tree(load_config([*MODEL, *overrides]))
    for key, _, value in keys:
        found: Any = tree
        *path, last = key.split(".")
        for part in path:
            found = found[part]
        assert last in found if value else last not in found
    swept: list[Config] = []
    monkeypatch.setattr("sae_rl.commands.train.run_training", lambda config, _: swept.append(config))
    assert sae_rl("train", "-m", *MODEL, *overrides, "seed=0,1").code == 0
    assert [config.task for config in swept] == [load_config([*MODEL, *overrides]).task] * 2


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("hydra/launcher=joblib", ["pip install hydra-joblib-launcher"]),
        ("hydra/launcher=ray", ["cannot be a job of Ray's launcher", "hydra/launcher=joblib"]),
        ("hydra/sweeper=optuna", ["pip install hydra-optuna-sweeper"]),
        ("hydra/sweeper=optna", ["did you mean 'optuna'?"]),
        (
            "learner.policy.optimizer.lr=interval(0.1,0.2)",
            ["an interval has no list of values", "hydra/sweeper=optuna"],
        ),
        ("hydra.sweep.dir=there", ["hydra.sweep.dir=there", "output_dir=..."]),
        ("algorithm=glob(nothing*)", ["algorithm=glob(nothing*): it stands for no value"]),
    ],
)
def test_a_sweep_that_hydra_cannot_run(
    override: str, fragments: list[str], sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is installed beside Hydra does not count here.
    monkeypatch.setattr("sae_rl.config.search_path.SearchPath.options", only_basic(SearchPath.options))
    assert_refused(sae_rl("train", "-m", *MODEL, override), *fragments)


def only_basic(options: Any) -> Any:
    return lambda self, group: ["basic"] if group in ("hydra/launcher", "hydra/sweeper") else options(self, group)


def test_the_other_batches_of_a_sweep_go_on_after_a_failure(
    sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def fail(config: Config, _: Any) -> None:
        seeds.append(config.seed)
        raise ConfigError(["one line", "and another"])

    monkeypatch.setattr("sae_rl.commands.train.run_training", fail)
    outcome = sae_rl("train", "-m", *MODEL, "seed=0,1", "hydra.sweeper.max_batch_size=1")
    assert (outcome.code, seeds) == (1, [0, 1])
    assert outcome.lines[0].endswith("/outputs/run/seed=0: one line; and another")
    assert len([line for line in outcome.lines if line.startswith("error: ")]) == 3


def test_a_sweep_in_a_file_of_the_user(sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[Config] = []
    monkeypatch.setattr("sae_rl.commands.train.run_training", lambda config, _: configs.append(config))
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    params = "{seed: '0,1', algorithm.estimator.lam: '0.5,0.9'}"
    (tmp_path / "own/experiment/grid.yaml").write_text(
        f"# @package _global_\nsteps: 3\nhydra: {{sweeper: {{params: {params}}}}}\n"
    )
    assert sae_rl("train", "-m", "--config-dir", "own", *MODEL, "experiment=grid", "seed=5,6").code == 0
    assert [config.output_dir.name for config in configs] == [
        f"algorithm.estimator.lam={lam},seed={seed}" for seed in (5, 6) for lam in (0.5, 0.9)
    ]
    assert {config.steps for config in configs} == {3}


def test_a_sweep_that_is_started_again_leaves_finished_runs_alone(
    sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def finish(config: Config, _: Any) -> None:
        seeds.append(config.seed)
        folder = config.output_dir / "checkpoints" / "step_000003"
        (folder / "hf").mkdir(parents=True)
        state = {"step": 3, "sampler": {}}
        (folder / "driver.json").write_text(json.dumps(state))
        checkpoint.write_manifest(folder, {})
        (config.output_dir / "config.yaml").write_text(yaml.safe_dump(as_tree(config), sort_keys=False))

    monkeypatch.setattr("sae_rl.commands.train.run_training", finish)
    assert sae_rl("train", "-m", *MODEL, "seed=0,1", "steps=3").code == 0
    again = sae_rl("train", "-m", *MODEL, "seed=0,1,2", "steps=3")
    assert (again.code, seeds) == (0, [0, 1, 2])
    assert again.stdout.count("finished before") == 2


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_optuna_maximises_the_last_held_out_success(
    launcher: str, sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")

    def score(config: Config, _: Any) -> None:
        config.output_dir.mkdir(parents=True)
        success = 1 - abs(config.learner.policy.optimizer.lr - 0.5)
        rows = [{"step": 0, "phase": "evaluation", "evaluation/success_mean": value} for value in (0.0, success)]
        (config.output_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr("sae_rl.commands.train.run_training", score)
    optuna = ["hydra/sweeper=optuna", "learner.policy.optimizer.lr=interval(0.1,0.9)", "hydra.sweeper.n_trials=4"]
    optuna += [f"hydra/launcher={launcher}"]
    assert_refused(sae_rl("train", "-m", *MODEL, *optuna), "the last held-out success", "evaluation.every_steps")
    if launcher == "joblib":
        return  # other processes have the real run_training
    outcome = sae_rl("train", "-m", *MODEL, *optuna, "evaluation.every_steps=5")
    assert outcome.code == 0, outcome
    best = yaml.safe_load(Path("outputs/run/optimization_results.yaml").read_text())["best_params"]
    rates = [float(folder.name.partition("=")[2]) for folder in Path("outputs/run").iterdir() if folder.is_dir()]
    assert best["++learner.policy.optimizer.lr"] == min(rates, key=lambda rate: abs(rate - 0.5)) and len(rates) == 4
