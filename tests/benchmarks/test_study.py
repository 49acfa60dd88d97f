"""The study: its configurations are valid and differ as docs/study.md says."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from benchmarks.study.__main__ import main
from benchmarks.study.matrix import FILE, Matrix, Run
from sae_rl.commands.warm_start import WarmStartConfig, task_of
from sae_rl.config.compose import build, compose_tree, load_config
from sae_rl.config.schema import Config, as_tree, flat
from sae_rl.correlation.settings import CorrelateConfig, chosen

MATRIX = Matrix.read()
ROOT = FILE.parents[2]
SHAPE = {"model_type": "qwen3", "max_position_embeddings": 1024}
CREDIT = ("algorithm.estimator.", "algorithm.segmenter.", "algorithm.value_source.", "algorithm.whitening.")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with a folder for every base model: a configuration whose model is not there is refused."""
    monkeypatch.chdir(tmp_path)
    for task in MATRIX.tasks:
        for size in MATRIX.sizes:
            for seed in range(4):
                MATRIX.base(task, size, seed).mkdir(parents=True)
                (MATRIX.base(task, size, seed) / "config.json").write_text(json.dumps(SHAPE))


def configuration(run: Run, setting: str | None = None) -> dict[str, Any]:
    command, *overrides = MATRIX.train(run, setting)
    assert command == "train"
    return flat(as_tree(load_config(overrides)))


@pytest.mark.parametrize("task", MATRIX.tasks)
@pytest.mark.parametrize("arm", MATRIX.arms)
def test_an_arm_differs_from_the_first_in_its_credit_assignment_alone(arm: str, task: str) -> None:
    first = next(iter(MATRIX.arms))
    ours, base = (configuration(Run(name, task, "small", 3), "rate_2e-4") for name in (arm, first))
    changed = {key for key in ours | base if ours.get(key) != base.get(key)} - {"output_dir"}
    expected = {"learner.critic_pretraining.checkpoint"} if not MATRIX.has_critic(arm) else set()
    assert {key for key in changed if not key.startswith(CREDIT)} == expected
    assert bool(changed) == (arm != first)
    whitened = {key for key in changed if key.startswith("algorithm.whitening.")}
    assert not whitened or not MATRIX.has_critic(arm), "only methods without a critic are published without whitening"


@pytest.mark.parametrize("task", MATRIX.tasks)
def test_constants_follow_from_the_base_policy_as_the_design_says(task: str) -> None:
    tokens, length = (MATRIX.tasks[task][key] for key in ("segment_tokens", "response_tokens"))

    def knob(arm: str, key: str) -> float:
        return float(configuration(Run(arm, task, "small", 0))[f"algorithm.{key}"])

    rate = (length / tokens - 1) / (length - 1)  # the first token of a response always opens a segment
    lam = knob("sae_opens", "estimator.lam")
    matched = knob("gae_matched", "estimator.lam")
    assert matched == pytest.approx(lam**rate, abs=5e-5)
    assert 1 - 1 / (knob("length_adaptive", "estimator.alpha") * length) == pytest.approx(lam**rate, abs=2e-5)
    assert 1 - 1 / (knob("segment_adaptive", "estimator.alpha") * length / tokens) == pytest.approx(lam, abs=2e-3)
    assert knob("quantile", "segmenter.segment_tokens") == tokens
    assert knob("fixed_length", "segmenter.num_tokens") == round(1 / rate)
    assert knob("random", "segmenter.rate") == pytest.approx(rate, abs=5e-5)
    assert knob("entropy", "segmenter.opens_fraction") == pytest.approx(rate, abs=5e-5)


def test_a_poor_critic_changes_the_critic_alone_and_seeds_pair() -> None:
    ours, base = (
        configuration(Run("gae_matched", "level", "small", 1, critic)) for critic in ("poor_capacity", "good")
    )
    changed = {key for key in ours if ours[key] != base[key]}
    assert changed == {"output_dir", "learner.critic_pretraining.checkpoint"}
    other = configuration(Run("gae_matched", "level", "small", 2))
    assert {key for key in other if other[key] != base[key]} == {
        *("output_dir", "seed", "model.path", "learner.critic_pretraining.checkpoint")
    }


def test_base_models_and_critics_have_valid_commands() -> None:
    jobs = MATRIX.jobs(list(MATRIX.stages))
    made: dict[str, list[Config | WarmStartConfig]] = {"warm-start": [], "pretrain-critic": []}
    for job in jobs:
        if job.run is None:
            assert f"output_dir={job.made if job.command[0] == 'warm-start' else job.made.parent}" in job.command
        # One seed stands for all: only numbers differ.
        if job.run is None and any(word.endswith("seed=0") for word in job.command):
            command, *overrides = job.command
            if command == "warm-start":
                config = build(WarmStartConfig, compose_tree(overrides, "warm_start"))
                task_of(config.demonstrations)
                made[command].append(config)
            else:
                made[command].append(load_config(overrides))
    assert len(made["warm-start"]) == 6  # two tasks at three sizes
    assert len(made["pretrain-critic"]) == 8  # two tasks: three critics at the small size, one at the large one


def test_a_problem_of_training_is_one_of_the_demonstrations_task() -> None:
    for task in MATRIX.tasks:
        run = configuration(Run("sae_opens", task, "small", 0))
        command = MATRIX.jobs(["core"])
        first = next(job for job in command if job.made == MATRIX.base(task, "small", 0))
        demonstrations = build(WarmStartConfig, compose_tree(first.command[1:], "warm_start")).demonstrations
        assert demonstrations.task == run["task.train.name"]
        knobs = {key.rpartition(".")[2]: value for key, value in run.items() if key.startswith("task.train.knobs.")}
        evaluated = {k.rpartition(".")[2]: v for k, v in run.items() if k.startswith("task.evaluation.knobs.")}
        assert knobs == evaluated
        assert knobs.items() <= demonstrations.knobs.items()


def test_seeds_are_outermost_so_that_a_stop_leaves_all_arms_with_the_same_seeds() -> None:
    jobs = [job for job in MATRIX.jobs(["core"]) if job.run]
    tuning = len([job for job in jobs if job.run and job.run.set == "tuning"])
    assert tuning == 24
    runs = [job.run for job in jobs[tuning:] if job.run]
    assert len(runs) == 60
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    for start in range(0, len(runs), 6):  # a block of all arms on one task
        assert [run.arm for run in runs[start : start + 6]] == MATRIX.stages["core"]["arms"]
    reserved = {MATRIX.tuning["seed"], *MATRIX.stages["pilot"]["seeds"]}
    assert not reserved & {
        run.seed for stage in MATRIX.stages if stage != "pilot" for run in MATRIX.runs(stage) if run.set == "study"
    }


def test_fidelity_is_measured_with_the_arms_themselves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", "--correlate"])
    main(["sae-rl"])
    found = {}
    for line in capsys.readouterr().out.splitlines():
        program, command, checkpoint, output, *overrides = shlex.split(line)
        assert (program, command) == ("sae-rl", "correlate")
        folder = Path(checkpoint.removeprefix("correlation.checkpoint="))
        found[output.removeprefix("output_dir=")] = (folder, overrides)
    assert len(found) == 20
    assert found["outputs/study/fidelity/sae_opens--level--small--1--0"][0] == (
        MATRIX.output(Run("sae_opens", "level", "small", 1)) / "checkpoints/step_000000"
    )
    run = Run("monte_carlo", "countdown", "small", 0)
    folder, overrides = found["outputs/study/fidelity/monte_carlo--countdown--small--0--30"]
    assert folder == MATRIX.output(run) / "checkpoints/step_000030"
    tree = compose_tree(overrides, "correlate")
    settings = build(CorrelateConfig, OmegaConf.masked_copy(tree, ["correlation"])).correlation
    assert settings.boundaries == ("sae_opens",)
    algorithms, lacking = chosen(settings, load_config(MATRIX.train(run)[1:]))
    assert not lacking
    assert set(algorithms) == set(MATRIX.arms) - {"values_ensemble"}
    for arm, algorithm in algorithms.items():
        own = load_config(MATRIX.train(Run(arm, "countdown", "small", 0))[1:]).algorithm
        for part in ("segmenter", "value_source", "estimator"):
            assert getattr(algorithm, part) == getattr(own, part), (arm, part)


def test_make_study_compares_the_area_of_each_folder_in_a_report_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python", "sae-rl"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n')
        (tmp_path / "bin" / name).chmod(0o755)
    make = ["make", "-f", str(ROOT / "Makefile"), "BIN=bin", "INSTALLED=", "study"]
    subprocess.run(make, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == ["python -m benchmarks.study --jobs 2"]  # no curves yet
    folders = ["docs/results/curves/study/countdown-small", "docs/results/curves/study/level-small"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(make, check=True)
    rest = "--outcome area --baseline monte_carlo --output outputs/study/comparison"
    made = (tmp_path / "calls").read_text().splitlines()[2:]
    assert made == [f"sae-rl compare {folder}/ {rest}/{Path(folder).name}" for folder in folders]
