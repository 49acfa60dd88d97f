"""Whole runs through the command line: every record, resume to the bit, interruption, and a KL against the reference."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sae_rl import checkpoint
from sae_rl.records import read_jsonl
from sae_rl.rollout_table import read_rollouts, rollout_files
from tests.stack.conftest import ROOT, command, overrides, run, train_rows, trained

pytestmark = pytest.mark.slow
KL = ["algorithm.token_rewards.kl_coef=0.05", "algorithm.policy_loss.kl_coef=0.1"]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with everything switched on."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    more = [
        *KL,
        "steps=4",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=3",
        "evaluation.every_steps=2",
        "logger.rollouts_every_steps=1",
        "logger.tensorboard=true",
        "learner.critic_pretraining.num_prompts=8",
        "learner.critic_pretraining.max_epochs=2",
    ]
    return trained(tiny_model, output, *more)


def test_records_of_a_run(finished: Path) -> None:
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [row["step"] for row in rows if row["phase"] == "train"] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if row["phase"] == "evaluation"] == [0, 2, 4]
    assert [row["step"] for row in rows if row["phase"] == "pretraining"] == [1, 2]
    last = train_rows(finished)[3]
    assert last["policy/num_updates"] == 2 and last["critic/num_updates"] == 2
    assert last["policy/ref_kl"] > 0, "the policy has moved away from the reference, which was asked"
    assert last["mismatch/logprob_abs_max"] < 1e-4 and last["sync/logprob_diff_max"] < 1e-4
    phases = sum(value for name, value in last.items() if name.startswith("time/") and name.count("_update") == 0)
    assert phases == pytest.approx(2 * last["time/step_s"], rel=1e-3), "phases and driver add up to the step"
    table = read_rollouts(rollout_files(finished)[-1][1])
    assert table.num_rows == 16
    assert {version for versions in table.column("policy_versions").to_pylist() for version in versions} == {3}
    assert list((finished / "tensorboard").rglob("events.*"))


def test_export_loads_in_transformers_and_is_the_trained_policy(finished: Path, tiny_model: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(finished / "policy").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(finished / "checkpoints" / "step_000004" / "hf").state_dict()
    assert policy.keys() == base.keys() == saved.keys()
    assert all(torch.equal(policy[name], saved[name]) for name in policy)
    assert any(not torch.equal(policy[name], base[name]) for name in policy)


def test_evaluate_reads_a_checkpoint(finished: Path, tiny_model: Path) -> None:
    folder = finished / "checkpoints" / "step_000004"
    more = [f"model.path={folder}", "evaluation.samples_per_prompt=2"]
    done = run("evaluate", *overrides(tiny_model, finished / "unused", *more))
    assert done.returncode == 0, done.stderr
    assert "avg@2" in done.stdout and "over 4 prompts" in done.stdout


def test_resume_equals_the_straight_run_to_the_bit(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(finished, resumed)
    for later in ("step_000004",):
        shutil.rmtree(resumed / "checkpoints" / later)
    shutil.rmtree(resumed / "policy")
    more = [*KL, "steps=4", "checkpoint.every_steps=2", "evaluation.every_steps=2", "logger.rollouts_every_steps=1"]
    done = run("train", *overrides(tiny_model, resumed, *more, "logger.console=plain"))
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout and "step_000002" in done.stdout
    for step, row in train_rows(finished).items():
        again = train_rows(resumed)[step]
        for name in row:
            if not name.startswith(("time", "throughput", "memory")):
                assert again[name] == row[name], f"step {step}: {name}"
    first, second = (load_file(folder / "policy" / "model.safetensors") for folder in (finished, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_left_to_train_is_said(finished: Path, tiny_model: Path) -> None:
    done = run("train", *overrides(tiny_model, finished, "steps=4"))
    assert done.returncode == 2
    assert "nothing is left to train" in done.stderr and "Traceback" not in done.stderr


def test_a_demo_killed_before_its_policy_was_published_shows_what_it_learned(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(finished, folder)
    shutil.copytree(tiny_model, folder / "base")
    shutil.rmtree(folder / "policy")
    done = run("demo", *overrides(folder / "base", folder, "steps=4"))
    assert done.returncode == 0, done.stderr
    assert "Ray, vLLM, DeepSpeed" not in done.stdout, "nothing was left to train"
    assert (folder / "policy" / "model.safetensors").is_file() and (folder / "report.html").is_file()


def start_and_wait_for_a_step(
    model: Path, output: Path, *more: str
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    arguments = overrides(model, output, "steps=500", "checkpoint.every_steps=1", *more)
    process = subprocess.Popen(
        command("train", *arguments), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while (newest := checkpoint.newest(output / "checkpoints")) is None or newest.name < "step_000002":
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "no step within 200 s"
        time.sleep(0.2)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_goes_on(
    tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "run"
    schedule = ["schedule=overlapped"] if number == signal.SIGINT else []  # whose sampling thread must end as well
    process, children = start_and_wait_for_a_step(tiny_model, output, *schedule)
    assert len(children) >= 6  # Ray, the three workers, vLLM's one, the reward pool
    started = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    # Of a driver that was killed, Ray's two agents take a minute to notice.
    agents = [child for child in children if number == signal.SIGKILL and is_agent(child)]
    _, alive = psutil.wait_procs([child for child in children if child not in agents], timeout=10)
    assert not alive, [child.cmdline()[:3] for child in alive]
    assert time.monotonic() - started < 10
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "the same command goes on" in errors, errors
        assert "Traceback" not in errors
    newest = checkpoint.newest(output / "checkpoints")
    assert newest is not None
    steps = checkpoint.read_state(newest).step + 1
    if number == signal.SIGKILL:
        done = run("train", *overrides(tiny_model, output, f"steps={steps}", "checkpoint.every_steps=1"))
        assert done.returncode == 0, done.stderr
        assert json.loads((output / "checkpoints" / f"step_{steps:06d}" / "driver.json").read_text())["step"] == steps
    _, alive = psutil.wait_procs(agents, timeout=120)
    assert not alive, [child.cmdline()[:3] for child in alive]


def is_agent(process: psutil.Process) -> bool:
    try:
        return "Agent" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
