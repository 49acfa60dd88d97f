"""Whole runs with every value source, in one session: real continuations of real engines, checked by real processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from sae_rl.commands.train import run_training
from sae_rl.config.compose import load_config
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import read_rollouts, step_files
from sae_rl.rollouts import continuations as module
from sae_rl.rollouts.continuations import PolicyContinuations
from sae_rl.types import Rollout
from sae_rl.workers.session import Session
from tests.stack.conftest import Killed, assert_same_run, has_checkpoint, killed, no_process_left, overrides
from tests.stack.rewards import CHECKS, parity

pytestmark = pytest.mark.alone
COMMON = ("algorithm.segmenter.p=0.1", "algorithm.estimator.lam=0.5", "logger.rollouts_every_steps=1")
RUNS = {
    "critic": (),
    "without budget": ("algorithm/value_source=monte_carlo", "algorithm.value_source.budget_tokens=0"),
    "ensemble of one": ("algorithm/value_source=ensemble", "algorithm.value_source.num_critics=1"),
    "monte_carlo": (
        *("algorithm/value_source=monte_carlo", "algorithm.value_source.budget_tokens=2000"),
        *("algorithm.value_source.k=3", "algorithm.value_source.order=variance"),
    ),
    "held": (
        *("algorithm/value_source=monte_carlo", "algorithm.value_source.budget_tokens=100000"),
        *("algorithm.value_source.k=1", "algorithm.value_source.elsewhere=held"),
    ),
    "disagreement": (
        *("algorithm/value_source=monte_carlo", "algorithm.value_source.budget_tokens=500"),
        *("algorithm.value_source.order=disagreement", "algorithm.value_source.num_critics=2"),
    ),
    "group_mean": ("algorithm/value_source=group_mean",),
    "prefix_tree": ("algorithm/value_source=prefix_tree", "rollout.first_responses=2"),
}
EACH_STEP = "checkpoint.every_steps=1"
RESPONSES, LATER = 16, 24  # of a step; checks of continuations after which a run is killed


@pytest.fixture(scope="module")
def sampled() -> dict[str, list[tuple[Rollout, float]]]:
    """All continuations of the runs, joined with what they continue, and their returns."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder inside for each run."""
    return tmp_path_factory.mktemp("values")


@pytest.fixture(scope="module")
def killed_within(tiny_model: Path, folder: Path) -> Iterator[tuple[Killed, int]]:
    """The run ``monte_carlo``, killed in its second step while continuations are sampled; and its checks until then."""
    output, checks = folder / "killed", folder / "checks"
    checks.touch()
    enough: list[int] = []

    def continues() -> bool:
        if not enough and has_checkpoint(output, 1):  # all responses and continuations of the first step were checked
            enough.append(checks.stat().st_size + RESPONSES + LATER)
        return bool(enough) and checks.stat().st_size >= enough[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHECKS, str(checks))
        run = killed(tiny_model, output, continues, signal.SIGKILL, *COMMON, *RUNS["monte_carlo"], EACH_STEP)
    num_checks = checks.stat().st_size
    yield run, num_checks
    _, alive = psutil.wait_procs(run.agents, timeout=120)
    assert not alive, [child.cmdline()[:3] for child in alive]


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path,
    folder: Path,
    killed_within: tuple[Killed, int],
    sampled: dict[str, list[tuple[Rollout, float]]],
) -> Iterator[Path]:
    """Two steps with each value source; and the rest of the killed run."""
    returns_of = PolicyContinuations._returns
    name = ""

    def returns(self: PolicyContinuations, rollouts: Any, rewards: Any) -> torch.Tensor:
        found = returns_of(self, rollouts, rewards)
        sampled.setdefault(name, []).extend(zip(rollouts, found.tolist(), strict=True))
        return found

    with no_process_left(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.PolicyContinuations, "_returns", returns)
        session = Session()
        try:
            for name, options in RUNS.items():
                run_training(load_config(overrides(tiny_model, folder / name, *COMMON, *options)), session)
            name, again = "resumed", (*COMMON, *RUNS["monte_carlo"], EACH_STEP)
            run_training(load_config(overrides(tiny_model, folder / "killed", *again)), session)
        finally:
            session.close()
    yield folder


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "train"]


@pytest.mark.parametrize("other_name", ["without budget", "ensemble of one"])
def test_without_a_budget_or_with_one_critic_a_run_equals_that_of_the_critic_to_the_bit(
    finished: Path, other_name: str
) -> None:
    assert_same_run(finished / "critic", finished / other_name)


def test_a_run_killed_within_its_continuations_goes_on_and_equals_the_straight_one_to_the_bit(
    finished: Path, killed_within: tuple[Killed, int], sampled: dict[str, list[tuple[Rollout, float]]]
) -> None:
    run, num_checks = killed_within
    assert not run.alive and run.seconds < 10, [child.cmdline()[:3] for child in run.alive]
    versions = [int(rollout.policy_versions[-1]) for rollout, _ in sampled["monte_carlo"]]
    first, second = versions.count(0), versions.count(1)
    assert 2 * RESPONSES + first < num_checks < 2 * RESPONSES + first + second, "killed within those of the last step"
    assert len(sampled["resumed"]) == second, "the first step was not repeated"
    assert_same_run(finished / "monte_carlo", finished / "killed")


def test_continuations_are_checked_as_whole_responses_and_the_budget_is_kept(
    finished: Path, tiny_model: Path, sampled: dict[str, list[tuple[Rollout, float]]]
) -> None:
    for row in rows_of(finished / "monte_carlo"):
        assert 1000 < row["values/continuation_tokens"] <= 2000
        assert 0 < row["values/measured_fraction"] < 1
    assert all(row["values/measured_fraction"] == 1 for row in rows_of(finished / "held"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for rollout, score in [*sampled["monte_carlo"], *sampled["held"]]:
        assert rollout.token_ids.numel() <= 24
        assert rollout.text == tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        assert score == parity("", rollout.text, "")
    assert {score for _, score in sampled["held"]} == {0.0, 1.0}


def test_values_are_held_from_one_boundary_to_the_next(finished: Path) -> None:
    _, file = step_files(finished / "held" / "rollouts")[0]
    for row in read_rollouts(file).to_pylist():
        values, opens = row["values"], row["opens"]
        for t in range(1, len(values)):
            assert values[t] in (0.0, 1.0) if opens[t] else values[t] == values[t - 1]


def test_no_critic_was_started_where_none_is_needed(finished: Path) -> None:
    for name in RUNS:
        has_critic = "critic/loss" in rows_of(finished / name)[-1]
        assert has_critic is (name not in ("held", "group_mean", "prefix_tree")), name


def test_the_critics_of_an_ensemble_begin_alike_and_then_differ(finished: Path) -> None:
    first, second = rows_of(finished / "disagreement")
    assert first["values/spread_mean"] == 0 < second["values/spread_mean"]
    assert second["values/continuation_tokens"] <= 500


def test_branches_share_tokens_and_logprobs_and_the_learners_agree_with_them(finished: Path) -> None:
    _, file = step_files(finished / "prefix_tree" / "rollouts")[-1]
    rows = read_rollouts(file).to_pylist()
    shared = 0
    for group in (rows[i : i + 4] for i in range(0, 16, 4)):
        assert len({row["prompt_id"] for row in group}) == 1
        for branch in group[2:]:
            pairs = (zip(branch["token_ids"], first["token_ids"], strict=False) for first in group[:2])
            shared += max(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both)) for both in pairs)
    assert shared > 16
    assert all(row["mismatch/logprob_abs_max"] < 1e-4 for row in rows_of(finished / "prefix_tree"))
