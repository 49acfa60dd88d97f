"""The command line with a model that is there, where nothing may start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandLine, Outcome


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is never started: an attempt would end with exit code 1."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", refuse)


@pytest.fixture
def train(sae_rl: CommandLine, tiny_model: Path) -> Callable[..., Outcome]:
    """``sae-rl train`` with a model that is there, and small settings."""
    small = ["rollout.prompts_per_step=2", "rollout.group_size=2", "learner.critic_pretraining.num_prompts=2"]
    small += [
        "evaluation.every_steps=2",
        "learner.policy.num_mini_batches=1",
        "learner.critic.num_mini_batches=1",
        "rollout.max_response_tokens=64",
    ]
    small += ["task.train.num_prompts=4", "task.evaluation.num_prompts=2", "logger=off", "steps=2"]

    def call(*overrides: str) -> Outcome:
        files = "task=dapo_math" in overrides
        sizes = small[:-5] + small[-2:] if files else small
        return sae_rl("train", f"model.path={tiny_model}", "output_dir=out", *sizes, *overrides)

    return call
