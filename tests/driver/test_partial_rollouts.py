"""Partial rollouts against workers in memory: what is left over comes a step later, once, and within the bound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from sae_rl import checkpoint
from sae_rl.data.sampler import Sampler
from sae_rl.overlapped import train_overlapped
from sae_rl.protocols import Metrics
from sae_rl.settings import ConfigError
from sae_rl.types import Batch, Scores, Targets

from .scripted import ScriptedWorkers, make_config, make_prompts, make_run, until

PARTIAL = ["schedule=overlapped", "schedule.max_staleness=2", "rollout.prompts_under_way=3"]


def trained(
    folder: Path, *overrides: str, resume_from: Path | None = None, workers: ScriptedWorkers | None = None
) -> ScriptedWorkers:
    workers = workers or ScriptedWorkers()
    train_overlapped(make_run(make_config(folder, *PARTIAL, *overrides), workers, resume_from))
    return workers


def groups_of(workers: ScriptedWorkers) -> list[list[str]]:
    """The prompts that each step learnt from."""
    batches = [call.of["batch"] for call in workers.asked("update")]
    firsts = [batch.prompt_token_ids[batch.prompt_offsets[:-1]].tolist() for batch in batches]
    return [[f"p{first - 1000}" for first in groups[::2]] for groups in firsts]


def test_left_over_groups_come_in_the_next_step_and_every_prompt_is_answered_once(tmp_path: Path) -> None:
    workers = trained(tmp_path, "steps=4")
    asked = [call.of["prompts"] for call in workers.asked("add")]
    assert [len(prompts) for prompts in asked] == [3, 2, 2, 2]
    taken = groups_of(workers)
    assert all(len(groups) == 2 for groups in taken)
    # The last that was asked for is done first, so the first of the step is left over, and is in the next one.
    assert taken[0] == asked[0][1:]
    assert taken[1] == [asked[0][0], asked[1][1]]
    assert taken[2] == [asked[1][0], asked[2][1]]
    counts = Counter(name for groups in taken for name in groups)
    assert set(counts.values()) == {1}, "within an epoch"
    left_over = [call.of["metrics"]["sampling/left_over_fraction"] for call in workers.asked("log")]
    assert left_over == [0, *[0.5] * 3]


def test_no_token_is_older_than_the_bound(tmp_path: Path) -> None:
    class Learning(ScriptedWorkers):
        """Learns as long as the next step takes to begin, so that every step begins as early as it may."""

        def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> tuple[Metrics, Tensor]:
            step = len(self.asked("update"))
            if step < 5:  # the last
                until(lambda: len(self.asked("add")) > step + 1)
            return super().update(batch, scores, targets, seed=seed)

    workers = trained(tmp_path, "steps=6", workers=Learning())
    stale = [call.of["metrics"]["rollout/staleness_max"] for call in workers.asked("log")]
    assert max(stale) <= 2
    assert stale[2:] == [2] * 4, "left over by the step before, which began with weights that were a step old"


def test_a_resumed_run_samples_again_what_was_under_way(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    folder = tmp_path / "whole" / "checkpoints" / "step_000002"
    sampler = Sampler(make_prompts(), 100)
    sampler.load_state(checkpoint.read_state(folder).sampler)
    left = next(name for name in whole.asked("add")[1].of["prompts"] if name not in groups_of(whole)[1])
    assert sampler.next(2)[0].id == left
    resumed = trained(tmp_path / "resumed", resume_from=folder)
    assert resumed.asked("add")[0].of["prompts"][0] == left
    seen = [name for groups in (*groups_of(whole)[:2], *groups_of(resumed)[:2]) for name in groups]
    assert len(set(seen)) == 8, "no prompt was lost, and none came twice"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.prompts_under_way=2"], r"more than rollout.prompts_per_step = 2 and at most twice"),
        (["rollout.prompts_under_way=5"], r"rollout.prompts_under_way = 5: more than"),
        (["schedule.max_staleness=1"], r"needs schedule=overlapped with schedule.max_staleness of at least 2"),
        (["schedule.weight_updates=drained"], r"and schedule.weight_updates=in_flight"),
        (["rollout.dynamic_sampling.mode=filter"], r"only one of them"),
    ],
)
def test_what_it_needs_is_said(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, *PARTIAL, *overrides)
