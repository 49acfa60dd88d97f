"""Tiny models and configurations for runs of the real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from sae_rl import checkpoint
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config
from sae_rl.records.clock import Clock
from sae_rl.records.records import read_jsonl
from sae_rl.sft import ModelShape, build_model, save
from sae_rl.tasks.level import Level
from sae_rl.tasks.tokenizer import build_tokenizer
from sae_rl.types import Prompt, Rollout, Sampling
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.session import start_workers
from sae_rl.workers.table import roles_of
from tests.conftest import Outcome, call

Configure = Callable[..., Config]
ROOT = Path(__file__).parents[2]
KL = ["algorithm.token_rewards.kl_coef=0.05", "algorithm.policy_loss.kl_coef=0.1"]
LORA = ["learner.lora.rank=4", "learner.lora.alpha=8", "learner.policy.optimizer.lr=0.05"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "untied", tied=False)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tied", tied=True)


def write_model(folder: Path, tied: bool, hidden_size: int = 64) -> Path:
    """A model with random weights, large enough that its distributions are far from uniform."""
    tokenizer = build_tokenizer(Level().words())
    shape = ModelShape(
        hidden_size=hidden_size,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    save(build_model(shape, tokenizer, seed=0), tokenizer, folder)
    return folder


def overrides(model: Path, output: Path, *more: str) -> list[str]:
    """A run of seconds: 4 prompts x 4 responses of at most 24 tokens, rewarded for the parity of their ids."""
    return [
        f"model.path={model}",
        f"output_dir={output}",
        "steps=2",
        "cluster.rollout.num_workers=1",
        "task.train.num_prompts=16",
        "task.train.reward=tests.stack.rewards:parity",
        "task.evaluation.num_prompts=4",
        "task.evaluation.reward=tests.stack.rewards:parity",
        "rollout.prompts_per_step=4",
        "rollout.max_response_tokens=24",
        "rollout.kv_cache_gb=0.25",
        "learner.policy.num_mini_batches=2",
        "learner.critic.num_mini_batches=2",
        "learner.policy.optimizer.lr=1e-2",
        "learner.critic_pretraining.num_prompts=0",
        "checkpoint.every_steps=0",
        "logger=off",
        *more,
    ]


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    """All processes that start meanwhile end within 10 s, but for the two servers of this process's multiprocessing."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    kept = {*before, forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    children = [child for child in psutil.Process().children(recursive=True) if child.pid not in kept]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"still running: {[process.cmdline()[:3] for process in alive]}"


def trained(model: Path, output: Path, *more: str) -> Outcome:
    """A whole run through the command line, which succeeds."""
    with no_process_left():
        done = call("train", *overrides(model, output, *more))
    assert done.code == 0, done.stderr
    return done


@dataclass(frozen=True)
class Killed:
    """How a run in a process of its own ended after a signal."""

    output: Path
    returncode: int
    stderr: str
    seconds: float
    alive: list[psutil.Process]  # its children 10 s later
    agents: list[psutil.Process]  # Ray's two, which take a minute to notice that their driver was killed


def has_checkpoint(output: Path, step: int) -> bool:
    newest = checkpoint.newest(output / "checkpoints")
    return newest is not None and newest.name >= f"step_{step:06d}"


def killed(model: Path, output: Path, when: Callable[[], bool], number: signal.Signals, *more: str) -> Killed:
    """A run that gets a signal once ``when`` is true: SIGINT with its children, as from a terminal."""
    arguments = [sys.executable, "-m", "sae_rl", "train", *overrides(model, output, *more)]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, cwd=ROOT, text=True, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 200
            while not when():
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline, "nothing to kill it at within 200 s"
                time.sleep(0.02)
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) >= 6, "Ray, the three workers, vLLM's process, the reward processes"
            agents = [child for child in children if number == signal.SIGKILL and "Agent" in " ".join(child.cmdline())]
            started = time.monotonic()
            os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            _, alive = psutil.wait_procs([child for child in children if child not in agents], timeout=10)
            return Killed(output, process.returncode, errors, time.monotonic() - started, alive, agents)
        finally:
            process.kill()


def assert_same_run(first: Path, second: Path) -> None:
    """All metrics but times are the same, and the trained policies to the bit."""
    rows, again = train_rows(first), train_rows(second)
    assert rows.keys() == again.keys()
    for step, row in rows.items():
        compared, others = (
            {name: value for name, value in each.items() if not name.startswith(("time", "throughput", "memory"))}
            for each in (row, again[step])
        )
        assert compared.keys() == others.keys()
        for name in compared:
            assert others[name] == compared[name], f"step {step}: {name}"
    one, other = (load_file(folder / "policy" / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def train_rows(folder: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "train"}


def for_learners(**keys: object) -> list[str]:
    """Overrides of both learners; ``num_workers`` is their number of ranks."""
    return [
        f"{'cluster' if key in ('num_workers', 'cpus_per_worker') else 'learner'}.{role}.{key.replace('__', '.')}={value}"
        for role in ("policy", "critic")
        for key, value in keys.items()
    ]


def start_learners(config: Config) -> contextlib.AbstractContextManager[RunWorkers]:
    """All workers but the rollout engines."""
    return start_workers(config, [], Clock(), [role for role in roles_of(config) if role != "rollout"])


def sampled(
    workers: RunWorkers, prompts: Sequence[Prompt], *, group_size: int, max_tokens: int, temperature: float = 1.0
) -> list[Rollout]:
    """Responses in the order of the prompts."""
    groups = {
        group[0].prompt.id: group
        for group in workers.rollout.generate(
            prompts,
            group_size=group_size,
            sampling=Sampling(max_tokens=max_tokens, temperature=temperature),
            seed_name="test",
        )
    }
    assert len(groups) == len(prompts), "every prompt is answered, and once"
    return [rollout for prompt in prompts for rollout in groups[prompt.id]]


@pytest.fixture
def configure(tiny_model: Path, tmp_path: Path) -> Configure:
    def configured(*more: str, model: Path = tiny_model, output: Path = tmp_path / "run") -> Config:
        return load_config(overrides(model, output, *more))

    return configured


@pytest.fixture(autouse=True)
def leaves_no_process() -> Iterator[None]:
    """Where tests share a Ray, its fixture checks this at its end."""
    with contextlib.nullcontext() if ray.is_initialized() else no_process_left():
        yield
