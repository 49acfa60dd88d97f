"""Whole runs through the command line: every record, a kill and resume to the bit, and a KL against the reference."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from sae_rl import checkpoint
from sae_rl.cli import COMMANDS
from sae_rl.config.compose import load_config
from sae_rl.records.metrics import show
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import read_rollouts, step_files
from sae_rl.tasks.level import Level
from sae_rl.workers.session import ray_session
from tests.conftest import CommandLine, call
from tests.stack.conftest import KL, assert_same_run, has_checkpoint, killed, overrides, train_rows, trained

pytestmark = pytest.mark.alone
EVERYTHING = [
    *KL,
    "steps=4",
    "checkpoint.keep_last=3",
    "evaluation.every_steps=2",
    "evaluation.record_samples=true",
    "logger.rollouts_every_steps=1",
    "logger.tensorboard=true",
    "learner.critic_pretraining.num_prompts=8",
    "learner.critic_pretraining.max_epochs=2",
]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with everything switched on."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    trained(tiny_model, output, *EVERYTHING, "checkpoint.every_steps=2")
    return output


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
    table = read_rollouts(step_files(finished / "rollouts")[-1][1])
    assert table.num_rows == 16
    assert {version for versions in table.column("policy_versions").to_pylist() for version in versions} == {3}
    assert list((finished / "tensorboard").rglob("events.*"))
    evaluations = {row["step"]: row for row in rows if row["phase"] == "evaluation"}
    assert [step for step, _ in step_files(finished / "evaluation")] == list(evaluations)
    for step, file in step_files(finished / "evaluation"):
        samples = pq.read_table(file)
        assert mean(samples["reward"].to_pylist()) == pytest.approx(evaluations[step]["evaluation/success_mean"])
        assert mean(samples["num_tokens"].to_pylist()) == evaluations[step]["evaluation/response_tokens_mean"]


def test_export_loads_in_transformers_and_is_the_trained_policy(finished: Path, tiny_model: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(finished / "policy").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(finished / "checkpoints" / "step_000004" / "hf").state_dict()
    assert policy.keys() == base.keys() == saved.keys()
    assert all(torch.equal(policy[name], saved[name]) for name in policy)
    assert any(not torch.equal(policy[name], base[name]) for name in policy)


def test_a_killed_run_goes_on_and_equals_the_straight_one_to_the_bit(
    finished: Path, tiny_model: Path, tmp_path: Path, ending: list[psutil.Process]
) -> None:
    options = [*EVERYTHING, "checkpoint.every_steps=1"]
    output = tmp_path / "run"
    run = killed(tiny_model, output, lambda: has_checkpoint(output, 2), signal.SIGKILL, *options)
    ending += run.agents
    assert not run.alive and run.seconds < 10, [child.cmdline()[:3] for child in run.alive]
    newest = checkpoint.newest(run.output / "checkpoints")
    assert newest is not None and 2 <= checkpoint.read_state(newest).step < 4
    done = trained(tiny_model, run.output, *options, "logger.console=plain")
    assert f"resuming from {newest}" in done.stdout
    assert_same_run(finished, run.output)


def test_the_second_run_of_a_sweep_uses_the_engines_of_the_first_and_equals_a_run_of_its_own(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    done = trained(
        tiny_model, tmp_path, *EVERYTHING, "checkpoint.every_steps=2", "logger.console=plain", "-m", "seed=1,0"
    )
    assert done.stdout.count("the rollout engines of the run before are used again") == 1
    assert_same_run(finished, tmp_path / "seed=0")


@pytest.fixture(scope="module")
def ending() -> Iterator[list[psutil.Process]]:
    """Ray's two agents, which take a minute to notice that their driver was killed."""
    agents: list[psutil.Process] = []
    yield agents
    _, alive = psutil.wait_procs(agents, timeout=120)
    assert not alive, [child.cmdline()[:3] for child in alive]


@pytest.fixture(scope="module")
def evaluated(finished: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint on two data sets of one file: the folder that was written, and the console."""
    output = tmp_path_factory.mktemp("evaluated")
    problems = [Level().problem(0, "held_out", index) for index in range(6)]
    rows = [
        {"id": f"{i}", "prompt": problem.prompt, "answer": problem.answer, "task": "even" if i % 2 == 0 else "odd/<i>"}
        for i, problem in enumerate(problems)
    ]
    (output / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [
        f"model.path={finished / 'checkpoints' / 'step_000004'}",
        "task=file",
        "task.max_prompt_tokens=128",
        f"task.evaluation.path={output / 'problems.jsonl'}",
        "task.evaluation.num_prompts=null",
        "task.evaluation.reward=tests.stack.rewards:remainder",
        "evaluation.samples_per_prompt=4",
    ]
    done = call("evaluate", *overrides(tiny_model, output, *more))
    assert done.code == 0, done.stderr
    (folder,) = (output / "evaluation").iterdir()
    assert folder.name == "001_step_000004"
    return folder, done.stdout


def test_the_numbers_of_an_evaluation_follow_from_its_samples(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    summary, rows = (
        json.loads((folder / "summary.json").read_text()),
        pq.read_table(folder / "samples.parquet").to_pylist(),
    )
    assert summary["versions"]["sae-rl"] and summary["config"]["evaluation"]["samples_per_prompt"] == 4
    assert summary["data_sets"].keys() == {"even", "odd/<i>"} and len(rows) == 24
    for name, found in [(None, summary["all"]), *summary["data_sets"].items()]:
        of_set = [row for row in rows if name in (None, row["data_set"])]
        prompts = [of_set[i : i + 4] for i in range(0, len(of_set), 4)]
        assert all(len({row["prompt_id"] for row in prompt}) == 1 for prompt in prompts)
        assert found["num_prompts"] == len(prompts)
        assert found["success"]["value"] == pytest.approx(mean(row["reward"] for row in of_set))
        for k in (1, 2, 4):
            passed = [any(row["reward"] == 1 for row in s) for prompt in prompts for s in combinations(prompt, k)]
            assert found["pass_at"][str(k)]["value"] == pytest.approx(mean(passed))
        assert found["maj_at_n"]["value"] == pytest.approx(mean(map(elected_score, prompts)))
        assert found["response_tokens"]["value"] == pytest.approx(mean(len(row["token_ids"]) for row in of_set))
        assert found["truncated"]["value"] == mean(row["finish_reason"] == "length" for row in of_set)
        openings = [
            sum(t == 0 or math.exp(logprob) < 0.2 for t, logprob in enumerate(row["rollout_logprobs"]))
            for row in of_set
        ]
        assert [sum(row["opens"]) for row in of_set] == openings
        assert found["segments"]["per_response_mean"] == pytest.approx(mean(openings))
    assert 0 < summary["all"]["success"]["value"] < 1, "both kinds of sample"
    assert summary["all"]["success"]["low"] <= summary["all"]["success"]["value"] <= summary["all"]["success"]["high"]


def elected_score(samples: Sequence[dict[str, Any]]) -> float:
    """Of the most frequent answer; here "1" alone is right."""
    votes = Counter(row["extracted_answer"] for row in samples if row["extracted_answer"] is not None)
    first = [answer for answer in votes if votes[answer] == max(votes.values())]
    return mean(answer == "1" for answer in first) if first else 0.0


def test_the_page_and_the_console_show_an_evaluation(evaluated: tuple[Path, str]) -> None:
    folder, console = evaluated
    summary, page = json.loads((folder / "summary.json").read_text()), (folder / "samples.html").read_text()
    assert "all data sets: 6 prompts, 4 samples each" in console and "odd/<i>: 3 prompts" in console
    for label, name in (("avg@4", "success"), ("tokens, mean", "response_tokens")):
        line = next(line for line in console.splitlines() if line.strip().startswith(label))
        assert show(summary["all"][name]["value"]) in line and f"[{show(summary['all'][name]['low'])}" in line
    text = re.sub(r"<[^>]*>", "", page)
    for row in pq.read_table(folder / "samples.parquet").to_pylist():
        assert html.escape(row["response"]) in text and html.escape(row["prompt"]) in text
        assert html.escape(row["why"]) in text
    assert "odd/<i>" not in page and "remainder 1 <b>" not in page


def test_a_demo_killed_before_its_policy_was_published_shows_what_it_learned(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(finished, folder)
    shutil.copytree(tiny_model, folder / "base")
    shutil.rmtree(folder / "policy")
    done = call("demo", *overrides(folder / "base", folder, "steps=4"))
    assert done.code == 0, done.stderr
    assert "Ray, vLLM, DeepSpeed" not in done.stdout, "nothing was left to train"
    assert (folder / "policy" / "model.safetensors").is_file() and (folder / "report.html").is_file()


def test_sigterm_ends_a_command_as_ctrl_c_does(
    sae_rl: CommandLine, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside a Ray, which has a handler of its own. A whole run gets SIGINT in test_overlapped.py."""

    def terminated(arguments: list[str]) -> None:
        with ray_session(load_config(overrides(tiny_model, tmp_path))):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(COMMANDS, "train", terminated)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the command line does not handle SIGTERM"))
    done = sae_rl("train")
    signal.signal(signal.SIGTERM, before)
    assert done.code == 130 and "the same command continues" in done.stderr and "Traceback" not in done.stderr
    assert not ray.is_initialized()
