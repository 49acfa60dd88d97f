"""Every recipe of ``conf/algorithm/`` trains for two steps, through the command line, in processes that all of them share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_rl.config.compose import CONF, load_config
from sae_rl.config.schema import Config
from sae_rl.records.clock import Clock
from sae_rl.types import Prompt
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.session import ray_session, start_workers
from sae_rl.workers.table import roles_of
from tests.conftest import call
from tests.stack.conftest import no_process_left, overrides, train_rows

pytestmark = pytest.mark.alone
RECIPES = sorted(file.stem for file in (CONF / "algorithm").glob("*.yaml"))
MORE = {  # keys of a recipe that depend on the run
    "custom": ["algorithm.estimator.name=sae_rl.algo.estimators:TEMPO"],
    "dapo": ["rollout.dynamic_sampling.mode=resample", "algorithm.token_rewards.overlong_buffer_tokens=8"],
    "spo_chain": ["algorithm.value_source.k=2"],
    "vineppo": ["algorithm.value_source.k=2", "algorithm.segmenter.strings=[A]"],
    "tempo": ["rollout.first_responses=2"],
    "segment_gae": [  # SPO-chain with a critic
        *("algorithm.estimator.lam=0", "algorithm.segmenter.p=0.9", "algorithm.segmenter.every=5"),
        "algorithm.policy_loss.mask.below_probability=0.9",
    ],
}
OTHERS = {  # methods without a file
    "alpha_math": ["algorithm=sae", "algorithm/segmenter=delimiter", "algorithm.segmenter.strings=[A]"]
}


@pytest.fixture(scope="module")
def started(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunWorkers]:
    """An engine, a policy, a critic and a reference."""
    config = load_config(
        overrides(tiny_model, tmp_path_factory.mktemp("started"), "algorithm.policy_loss.kl_coef=0.1", "steps=0")
    )
    with no_process_left(), ray_session(config), start_workers(config, [], Clock()) as workers:
        yield workers


@pytest.mark.parametrize("recipe", [*RECIPES, *OTHERS])
def test_two_steps(
    recipe: str, started: RunWorkers, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def in_started(config: Config, probes: list[Prompt], clock: Clock, *others: Any) -> Iterator[RunWorkers]:
        workers = RunWorkers(config, {role: started._groups[role] for role in roles_of(config)}, probes, clock)
        workers.start(loaded=["rollout"])
        yield workers

    monkeypatch.setattr("sae_rl.commands.assemble.start_workers", in_started)
    monkeypatch.setattr("sae_rl.commands.assemble.ray_session", lambda config: contextlib.nullcontext())
    chosen = OTHERS.get(recipe) or [f"algorithm={recipe}", *MORE.get(recipe, [])]
    arguments = overrides(tiny_model, tmp_path / "run", *chosen)
    done = call("train", *arguments)
    assert done.code == 0, done.stderr
    rows, algorithm = train_rows(tmp_path / "run"), load_config(arguments).algorithm
    assert list(rows) == [0, 1]
    for row in rows.values():
        assert all(math.isfinite(row[name]) for name in ("policy/loss", "policy/grad_norm", "advantage/std"))
        assert row["policy/num_updates"] == 2 and row["policy/skipped_updates"] == 0
        assert ("critic/loss" in row, "policy/ref_kl" in row) == (algorithm.needs_critic, algorithm.needs_reference)
        if recipe == "dapo_80_20":
            assert 0.2 <= row["policy/kept_fraction"] < 0.25
