"""The study: its configurations are valid and differ as docs/study.md says, and its runner survives kills."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.study import curves
from benchmarks.study.__main__ import variance
from benchmarks.study.matrix import FILE, Matrix, Run
from benchmarks.study.runner import Runner
from sae_rl.commands.warm_start import WarmStartConfig, task_of
from sae_rl.comparison.curves import read_csv
from sae_rl.config.compose import build, compose_tree, load_config
from sae_rl.config.schema import Config, as_tree, flat

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


# A stand-in for sae-rl: it makes what each command makes, and fails, waits or dies as a file in its folder says.
SCRIPT = """
import json, os, pathlib, sys, time
command, *overrides = sys.argv[1:]
keys = dict(word.split("=", 1) for word in overrides)
folder = pathlib.Path(keys["output_dir"])
calls = pathlib.Path("calls")
with calls.open("a") as lines:
    lines.write(f"{command} {folder}\\n")
rule = pathlib.Path("rules") / folder.name
failing = rule.exists() and rule.read_text() == "fail"
if failing and command != "train":
    sys.exit("error: no luck\\nmore")
if rule.exists() and rule.read_text() == "wait":
    pathlib.Path("waiting").write_text(str(os.getpid()))
    time.sleep(60)
if command == "warm-start":
    folder.mkdir(parents=True)
elif command == "pretrain-critic":
    (folder / "critic").mkdir(parents=True)
    (folder / "critic" / "critic.json").write_text(json.dumps({"explained_variance": 0.25}))
else:
    folder.mkdir(parents=True, exist_ok=True)
    seed = int(keys["seed"])
    rate = float(keys.get("learner.policy.optimizer.lr", 0))
    last = 5 if failing else 10
    tree = {"seed": seed, "steps": 10, "algorithm": {}, "rollout": {"prompts_per_step": 2, "group_size": 2}}
    tree["task"] = {"train": {"name": "level"}, "evaluation": {"name": "level"}}
    tree["evaluation"] = {"every_steps": 5, "pass_score": 1, "temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0}
    (folder / "config.yaml").write_text(json.dumps(tree))
    with (folder / "metrics.jsonl").open("w") as rows:
        for step in range(last + 1):
            if step % 5 == 0:
                row = {"step": step, "phase": "evaluation", "evaluation/success_mean": 0.2 + rate * 100 * step + seed / 100}
                rows.write(json.dumps(row) + "\\n")
            if step < last:
                row = {"step": step, "phase": "train", "rollout/tokens_mean": 7.0, "rollout/reward_mean": 0.5}
                rows.write(json.dumps(row) + "\\n")
    if failing:
        sys.exit("error: diverged")
    (folder / "policy").mkdir()
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The current folder, with a small matrix, the stand-in and its rules."""
    rates = {"slow": ["learner.policy.optimizer.lr=1e-4"], "fast": ["learner.policy.optimizer.lr=2e-4"]}
    matrix = {
        "folder": "out",
        "curves": "curves",
        "train": ["steps=10"],
        "tasks": {"level": {"warm_start": [], "train": []}},
        "sizes": {"small": {"warm_start": []}},
        "critics": {"good": {"size": None, "pretrain_critic": {"level": []}}},
        "arms": {"one": {}, "two": {"train": ["steps=10", "algorithm=gae"]}, "free": {"critic": False}},
        "tuning": {"size": "small", "seed": 100, "settings": rates},
        "stages": {
            "plain": {"set": "pilot", "arms": ["one", "two"], "seeds": [0, 1]},
            "tuned": {"set": "study", "arms": ["one", "free"], "seeds": [0]},
        },
    }
    for stage in matrix["stages"].values():  # type: ignore[attr-defined]
        stage |= {"tasks": ["level"], "sizes": ["small"], "critics": ["good"]}
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))
    (tmp_path / "stand_in.py").write_text(SCRIPT)
    (tmp_path / "rules").mkdir()
    return tmp_path


def runner(folder: Path, stages: Sequence[str]) -> Runner:
    matrix = Matrix.read(folder / "matrix.yaml")
    return Runner(matrix, matrix.jobs(stages), (sys.executable, "stand_in.py"))


def calls(folder: Path) -> list[str]:
    file = folder / "calls"
    return [line.replace("out/", "") for line in file.read_text().splitlines()] if file.exists() else []


PLAIN = [
    "warm-start base/level--small--0",
    "pretrain-critic critic/good--level--small--0",
    "train pilot/one--level--small--0",
    "train pilot/two--level--small--0",
    "warm-start base/level--small--1",
    "pretrain-critic critic/good--level--small--1",
    "train pilot/one--level--small--1",
    "train pilot/two--level--small--1",
]


def test_runs_in_order_and_repeats_nothing(study: Path) -> None:
    runner(study, ["plain"]).run()
    assert calls(study) == PLAIN
    runner(study, ["plain"]).run()
    assert calls(study) == PLAIN
    curve = read_csv(study / "curves/pilot/level-small/two--1.csv")
    assert (curve.arm, curve.seed, curve.steps, curve.problem) == ("two", "1", 10, "")
    assert curve.success == pytest.approx({0: 0.21, 5: 0.21, 10: 0.21})
    assert set(curve.training["rollout/reward_mean"].values()) == {0.5}
    record = json.loads((study / "curves/pilot/level-small/two--1.json").read_text())
    assert record["state"] == "finished"
    assert record["critic_explained_variance"] == 0.25
    critic = "learner.critic_pretraining.checkpoint=out/critic/good--level--small--1/critic"
    assert record["command"][-2:] == ["algorithm=gae", critic]
    assert record["command"].count("steps=10") == 1
    assert len(record["config_sha256"]) == 64
    assert len(record["commit"].rstrip("+")) in (0, 40)


def test_what_is_committed_is_not_repeated_without_the_folders_of_the_runs(study: Path) -> None:
    runner(study, ["plain"]).run()
    subprocess.run(["rm", "-r", "out/pilot"], check=True)
    runner(study, ["plain"]).run()
    assert calls(study) == PLAIN


def test_two_side_by_side_wait_for_what_they_need(study: Path) -> None:
    runner(study, ["plain"]).run(num_side_by_side=2)
    found = calls(study)
    assert sorted(found) == sorted(PLAIN)
    for seed in (0, 1):
        base, critic, *trained = (found.index(line) for line in PLAIN if line.endswith(f"--{seed}"))
        assert base < critic < min(trained)


def test_a_run_that_fails_is_tried_twice_and_counts(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "rules" / "two--level--small--0").write_text("fail")
    runner(study, ["plain"]).run()
    runner(study, ["plain"]).run()
    assert calls(study).count("train pilot/two--level--small--0") == 2
    assert "failed, attempt 2 of 2: error: diverged" in capsys.readouterr().out
    record = json.loads((study / "curves/pilot/level-small/two--0.json").read_text())
    assert (record["state"], record["attempts"], record["message"]) == ("failed", 2, "error: diverged")
    curve = read_csv(study / "curves/pilot/level-small/two--0.csv")
    assert curve.success == pytest.approx({0: 0.2, 5: 0.2, 10: 0.0})
    assert curve.problem == ""  # so that `sae-rl compare` counts it
    assert curves.area(study / "curves/pilot/level-small/two--0.csv") == pytest.approx((0.2 * 5 + 0.1 * 5) / 10)
    assert json.loads((study / "curves/pilot/level-small/two--1.json").read_text())["state"] == "finished"


def test_a_base_model_that_fails_blocks_its_runs_alone(study: Path) -> None:
    (study / "rules" / "level--small--0").write_text("fail")
    found = runner(study, ["plain"])
    found.run()
    assert calls(study) == [PLAIN[0], PLAIN[0], *PLAIN[4:]]
    states = found.states()
    assert states["out/base/level--small--0"] == "failed"
    assert states["out/critic/good--level--small--0"] == states["pilot/one--level--small--0"] == "blocked"
    assert states["pilot/one--level--small--1"] == "finished"


def test_no_run_starts_after_the_minutes(study: Path) -> None:
    runner(study, ["plain"]).run(minutes=0)
    assert calls(study) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_study_continues(study: Path, number: signal.Signals) -> None:
    rule = study / "rules" / "two--level--small--0"
    rule.write_text("wait")
    program = "import sys; from benchmarks.study.__main__ import main; main([sys.executable, 'stand_in.py'])"
    command = [sys.executable, "-c", program, "--matrix", "matrix.yaml", "--stages", "plain"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    waiting = study / "waiting"
    deadline = time.monotonic() + 60
    while not waiting.exists() or not waiting.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    left = int(waiting.read_text())
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGTERM else -number)
    assert calls(study) == PLAIN[:4]
    rule.unlink()
    if number == signal.SIGKILL:  # the run goes on, and nothing else may work in its folder
        with pytest.raises(RuntimeError, match="at work there"):
            runner(study, ["plain"]).run()
        os.kill(left, signal.SIGKILL)
        while Path(f"/proc/{left}").exists() and "zombie" not in Path(f"/proc/{left}/status").read_text():
            time.sleep(0.05)
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(left, 0)
    runner(study, ["plain"]).run()
    assert calls(study) == [*PLAIN[:4], *PLAIN[3:]]
    assert "attempts" not in json.loads((study / "curves/pilot/level-small/two--0.json").read_text())


def test_a_run_that_ended_before_it_was_written_down_is_not_repeated(study: Path) -> None:
    runner(study, ["plain"]).run()
    for file in (study / "curves/pilot/level-small").glob("two--1.*"):
        file.unlink()
    runner(study, ["plain"]).run()
    assert calls(study) == PLAIN
    assert read_csv(study / "curves/pilot/level-small/two--1.csv").steps == 10


def test_tuning_comes_first_and_its_best_setting_is_used(study: Path) -> None:
    found = runner(study, ["tuned"])
    found.run(num_side_by_side=2)
    lines = calls(study)
    tuned = [line for line in lines if "tuning/" in line]
    assert len(tuned) == 4
    assert max(map(lines.index, tuned)) < min(lines.index(line) for line in lines if "study/" in line)
    for arm in ("one", "free"):
        record = json.loads((study / f"curves/study/level-small/{arm}--0.json").read_text())
        assert "learner.policy.optimizer.lr=2e-4" in record["command"]
    assert not any("critic" in line for line in lines if "free" in line)


def test_a_changed_matrix_is_refused(study: Path) -> None:
    runner(study, ["plain"]).run()
    text = (study / "matrix.yaml").read_text()
    (study / "matrix.yaml").write_text(text.replace("algorithm=gae", "algorithm=rloo"))
    with pytest.raises(ValueError, match="algorithm=gae algorithm=rloo differ"):
        runner(study, ["plain"]).run()
    assert calls(study) == PLAIN


def test_make_study_compares_the_area_of_each_folder_in_a_report_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python", "sae-rl"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n')
        (tmp_path / "bin" / name).chmod(0o755)
    make = ["make", "-f", str(ROOT / "Makefile"), "BIN=bin", "INSTALLED=", "study"]
    subprocess.run(make, check=True)
    assert calls(tmp_path) == ["python -m benchmarks.study --jobs 2"]  # no curves yet
    folders = ["docs/results/curves/study/countdown-small", "docs/results/curves/study/level-small"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(make, check=True)
    rest = "--outcome area --baseline monte_carlo --output outputs/study/comparison"
    assert calls(tmp_path)[2:] == [f"sae-rl compare {folder}/ {rest}/{Path(folder).name}" for folder in folders]


def test_unknown_names_in_the_matrix_are_refused(study: Path) -> None:
    text = (study / "matrix.yaml").read_text()
    (study / "matrix.yaml").write_text(text.replace("tasks:\n    - level", "tasks:\n    - chess"))
    with pytest.raises(ValueError, match=r"tasks = \['chess'\], allowed: level"):
        runner(study, ["plain"])
    (study / "matrix.yaml").write_text(text)
    with pytest.raises(ValueError, match="no stage 'later', allowed: plain, tuned"):
        runner(study, ["later"])


def test_the_pilots_table_has_the_standard_deviation_of_paired_differences(study: Path) -> None:
    runner(study, ["plain"]).run()
    matrix = Matrix.read(study / "matrix.yaml")
    for seed, shift in ((0, 0.0), (1, 0.06)):  # differences of 0 and 0.06: s = 0.06 / sqrt(2)
        file, before = matrix.curves / f"pilot/level-small/two--{seed}.csv", 0.2 + seed / 100
        text = file.read_text()
        for step in (0, 5, 10):
            text = text.replace(f"evaluation,{step},{before:.6g}", f"evaluation,{step},{before + shift:.6g}")
        file.write_text(text)
    s = 0.06 / math.sqrt(2)
    counts = " | ".join(f"{(z * s / 0.03) ** 2:.1f}" for z in (2.927, 2.802))
    assert variance(matrix, "plain").splitlines()[-1] == f"| level, small | one, two | 2 | {s:.4f} | {counts} |"
