"""Tiny models and configurations for runs of the real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config
from sae_rl.records.records import read_jsonl
from sae_rl.sft import ModelShape, build_model, save
from sae_rl.tasks.level import Level
from sae_rl.tasks.tokenizer import build_tokenizer
from sae_rl.types import Prompt, Rollout, Sampling
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.session import ray_session

Configure = Callable[..., Config]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "untied", tied=False)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tied", tied=True)


def write_model(folder: Path, tied: bool) -> Path:
    """A model with random weights, large enough that its distributions are far from uniform."""
    tokenizer = build_tokenizer(Level().words())
    shape = ModelShape(
        hidden_size=64, num_heads=2, intermediate_size=64, initializer_range=0.3, tie_word_embeddings=tied
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


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sae_rl", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def trained(model: Path, output: Path, *more: str) -> Path:
    """A whole run through the command line, which succeeds."""
    done = run("train", *overrides(model, output, *more))
    assert done.returncode == 0, done.stderr
    return output


def train_rows(folder: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "train"}


def for_learners(**keys: object) -> list[str]:
    """Overrides of both learners; ``num_workers`` is their number of ranks, the others are keys of ``learner``."""
    return [
        f"{'cluster' if key == 'num_workers' else 'learner'}.{role}.{key.replace('__', '.')}={value}"
        for role in ("policy", "critic")
        for key, value in keys.items()
    ]


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


@pytest.fixture(scope="module")
def shared_ray(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for the tests of a module that start their own workers."""
    with ray_session(load_config(overrides(tiny_model, tmp_path_factory.mktemp("ray")))):
        yield


@pytest.fixture
def configure(tiny_model: Path, tmp_path: Path) -> Configure:
    def configured(*more: str, model: Path = tiny_model, output: Path = tmp_path / "run") -> Config:
        return load_config(overrides(model, output, *more))

    return configured


@pytest.fixture(autouse=True)
def leaves_no_process() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    children = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.pid not in before and child.name() != "ray::IDLE"  # of a Ray that goes on
    ]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"still running: {[process.cmdline()[:3] for process in alive]}"
