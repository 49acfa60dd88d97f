"""The runner of the study survives kills, and refuses what would mix settings or models."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from benchmarks.study import curves
from benchmarks.study.__main__ import variance
from benchmarks.study.matrix import FILE, Matrix
from benchmarks.study.runner import Runner
from sae_rl.comparison.curves import read_csv

ROOT = FILE.parents[2]


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
weights = rule.read_text() if rule.exists() else "weights"
failing = weights == "fail"
if failing and command != "train":
    sys.exit("error: no luck\\nmore")
if weights == "stop":
    os.kill(os.getppid(), 2)
    time.sleep(60)
if weights == "wait":
    pathlib.Path("waiting").write_text(str(os.getpid()))
    time.sleep(60)
if command == "warm-start":
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights)
elif command == "pretrain-critic":
    (folder / "critic").mkdir(parents=True)
    (folder / "critic" / "model.safetensors").write_text(weights)
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
        if pathlib.Path("once").exists():
            os.abort()  # leaves no message
        sys.exit("error: diverged")
    (folder / "policy").mkdir()
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a small matrix, the stand-in and its rules."""
    rates = {"slow": ["learner.policy.optimizer.lr=1e-4"], "fast": ["learner.policy.optimizer.lr=2e-4"]}
    monkeypatch.chdir(tmp_path)
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


def forget(folder: Path, run: str) -> None:
    """Removes all that there is of a run of the stage `plain`."""
    arm, *_, seed = run.split("--")
    for file in (folder / "curves/pilot/level-small").glob(f"{arm}--{seed}.*"):
        file.unlink()
    shutil.rmtree(folder / "out" / "pilot" / run, ignore_errors=True)


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
    shutil.rmtree("out")
    runner(study, ["plain"]).run()
    assert calls(study) == PLAIN
    forget(study, "two--level--small--1")
    runner(study, ["plain"]).run()
    assert calls(study) == [*PLAIN, *PLAIN[4:6], PLAIN[7]]  # with its base model and critic, and those of seed 0 not


def test_a_base_model_that_was_deleted_is_made_again_for_a_run_that_is_left(study: Path) -> None:
    runner(study, ["plain"]).run()
    shutil.rmtree("out/base/level--small--0")
    runner(study, ["plain"]).run()
    assert calls(study) == PLAIN
    forget(study, "two--level--small--0")
    runner(study, ["plain"]).run()
    assert calls(study) == [*PLAIN, PLAIN[0], PLAIN[3]]


@pytest.mark.parametrize(
    ("folder", "model"), [("base", "base/level--small--0"), ("critic", "critic/good--level--small--0")]
)
def test_runs_of_a_seed_with_other_models_are_refused(study: Path, folder: str, model: str) -> None:
    runner(study, ["plain"]).run()
    record = json.loads((study / "curves/pilot/level-small/one--0.json").read_text())
    assert record["base_sha256"] == record["critic_sha256"] == hashlib.sha256(b"weights").hexdigest()
    shutil.rmtree(f"out/{model}")
    (study / "rules" / Path(model).name).write_text("others")
    forget(study, "two--level--small--0")
    with pytest.raises(ValueError, match=rf"two--level--small--0 would begin .*/one--0.json: {folder}_sha256 differ;"):
        runner(study, ["plain"]).run()
    assert not any(line.startswith("train") for line in calls(study)[len(PLAIN) :])


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


def test_the_message_of_a_failed_run_is_that_of_its_last_attempt(study: Path) -> None:
    (study / "rules" / "two--level--small--0").write_text("fail")
    (study / "once").touch()
    log = study / "out/logs/pilot--two--level--small--0.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: of an earlier study\n")
    runner(study, ["plain"]).run()
    record = json.loads((study / "curves/pilot/level-small/two--0.json").read_text())
    assert (record["state"], record["message"]) == ("failed", "no output")


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


@pytest.mark.parametrize("state", ["finished", "failed", "interrupted"])
def test_a_changed_matrix_is_refused(study: Path, state: str) -> None:
    rule = study / "rules" / "two--level--small--0"
    if state == "failed":
        rule.write_text("fail")
    if state == "interrupted":  # at the first run that the change reaches
        rule.write_text("stop")
        with pytest.raises(KeyboardInterrupt):
            runner(study, ["plain"]).run()
    else:
        runner(study, ["plain"]).run()
        forget(study, "two--level--small--1")
    rule.unlink(missing_ok=True)
    before = calls(study)
    text = (study / "matrix.yaml").read_text()
    (study / "matrix.yaml").write_text(text.replace("algorithm=gae", "algorithm=rloo"))
    with pytest.raises(ValueError, match="algorithm=gae algorithm=rloo differ"):
        runner(study, ["plain"]).run()
    assert calls(study) == before


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
    counts = " | ".join(f"{(z * s / 0.03) ** 2:.1f}" for z in (2.927, 2.802, 3.576))
    assert variance(matrix, "plain").splitlines()[-1] == f"| level, small | one, two | 2 | {s:.4f} | {counts} |"
