"""The overlapped schedule against workers in memory: the same batches as the synchronous one, sampled ahead and in bounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_rl import checkpoint
from sae_rl.driver import train
from sae_rl.overlapped import train_overlapped
from sae_rl.protocols import Metrics
from sae_rl.rollouts.sampling_thread import SamplingThread
from sae_rl.types import Batch, Rollout, Scores, Targets

from .scripted import PATIENCE_S, ScriptedWorkers, make_config, make_prompts, make_run, until


@dataclass
class Timed(ScriptedWorkers):
    """Sampling a batch begins and ends when the test says so: ``hold`` is asked, in the thread that samples."""

    hold: Callable[[Timed, str], None] = lambda workers, seed_name: None
    began: dict[str, int | None] = field(default_factory=dict)  # stream: the weights' version then
    interrupted: bool = False

    def generate(self, prompts: Any, *, seed_name: str, **options: Any) -> Iterator[list[Rollout]]:
        self.began[seed_name] = self.version
        self.hold(self, seed_name)
        if self.interrupted:
            raise RuntimeError("sampling was interrupted")
        yield from super().generate(prompts, seed_name=seed_name, **options)

    def interrupt(self) -> None:
        self.interrupted = True


def overlapped(folder: Path, workers: Timed, *overrides: str, resume_from: Path | None = None) -> Timed:
    config = make_config(folder, "schedule=overlapped", *overrides)
    train_overlapped(make_run(config, workers, resume_from, heldout=make_prompts(3)))
    return workers


def updated(workers: ScriptedWorkers) -> list[Batch]:
    return [call.of["batch"] for call in workers.asked("update")]


def test_the_next_batch_is_sampled_while_a_step_trains(tmp_path: Path) -> None:
    class Learning(Timed):
        def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> tuple[Metrics, Tensor]:
            step = len(updated(self))
            if step < 5:  # the last step has none to come
                until(lambda: f"step {step + 1}" in self.began)
            return super().update(batch, scores, targets, seed=seed)

    workers = overlapped(tmp_path, Learning())
    assert workers.began == {"step 0": 0, **{f"step {k}": k - 1 for k in range(1, 6)}}, "one step behind, never more"
    assert [call.of["version"] for call in workers.asked("sync")] == list(range(7))


def test_batches_are_those_of_the_synchronous_schedule_but_for_their_weights(tmp_path: Path) -> None:
    straight, workers = ScriptedWorkers(), overlapped(tmp_path / "b", Timed())
    train(make_run(make_config(tmp_path / "a"), straight))
    for name in ("prompts", "seed_name", "sampling"):
        assert [call.of[name] for call in workers.asked("generate")] == [
            call.of[name] for call in straight.asked("generate")
        ]
    assert [call.of["seed"] for call in workers.asked("update")] == [
        call.of["seed"] for call in straight.asked("update")
    ]
    assert torch.equal(updated(workers)[0].token_ids, updated(straight)[0].token_ids)


@pytest.mark.parametrize("updates", ["drained", "in_flight"])
def test_drained_updates_wait_for_responses_under_way(tmp_path: Path, updates: str) -> None:
    """The second batch ends only after the weights were sent, or else a while later, if they wait for it."""

    def hold(workers: Timed, seed_name: str) -> None:
        if seed_name != "step 1":
            return
        if updates == "in_flight":
            until(lambda: workers.version == 1)
            return
        until(lambda: len(updated(workers)) == 1)
        time.sleep(0.2)
        assert workers.version == 0, "weights were sent to engines that sampled"

    workers = overlapped(tmp_path, Timed(hold=hold), "steps=3", f"schedule.weight_updates={updates}")
    assert workers.began["step 1"] == 0
    versions = [batch.policy_versions.unique().tolist() for batch in updated(workers)]
    assert versions[:2] == [[0], [1 if updates == "in_flight" else 0]]


def test_the_bound_on_staleness(tmp_path: Path) -> None:
    class Slow(Timed):
        def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> tuple[Metrics, Tensor]:
            until(lambda: f"step {min(len(updated(self)) + 2, 5)}" in self.began)
            time.sleep(0.05)  # for a batch that would begin too early
            return super().update(batch, scores, targets, seed=seed)

    workers = overlapped(tmp_path, Slow(), "schedule.max_staleness=2")
    assert workers.began == {"step 0": 0, "step 1": 0, **{f"step {k}": k - 2 for k in range(2, 6)}}
    stale = [call.of["metrics"]["rollout/staleness_max"] for call in workers.asked("log")]
    assert max(stale) == 2 and stale[0] == 0


def test_an_evaluation_has_the_engines_for_itself_and_the_weights_of_its_step(tmp_path: Path) -> None:
    def hold(workers: Timed, seed_name: str) -> None:
        if seed_name == "evaluation":
            time.sleep(0.1)  # for a batch that would begin beside it
            assert not [name for name in workers.began if name not in done and name != "evaluation"]
        done.append(seed_name)

    done: list[str] = []
    workers = overlapped(tmp_path, Timed(hold=hold), "evaluation.every_steps=2")
    evaluations = [call for call in workers.asked("generate") if call.of["seed_name"] == "evaluation"]
    assert [call.of["version"] for call in evaluations] == [0, 2, 4, 6]
    assert workers.began["step 2"] == 2 and workers.began["step 3"] == 2


def test_a_resumed_run_goes_on_behind_the_checkpoint_and_not_behind_what_was_sampled_ahead(tmp_path: Path) -> None:
    whole = overlapped(tmp_path / "whole", Timed())
    newest = tmp_path / "whole" / "checkpoints" / "step_000002"
    assert checkpoint.read_state(newest).step == 2
    resumed = overlapped(tmp_path / "resumed", Timed(), resume_from=newest)
    prompts = {call.of["seed_name"]: call.of["prompts"] for call in whole.asked("generate")}
    again = {call.of["seed_name"]: call.of["prompts"] for call in resumed.asked("generate")}
    assert list(again) == [f"step {k}" for k in range(2, 6)]
    assert all(again[seed_name] == prompts[seed_name] for seed_name in again)
    assert resumed.began["step 2"] == 2 and resumed.began["step 3"] == 2


def test_a_sampling_thread_that_begins_late_still_samples_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = SamplingThread._work

    def late(thread: SamplingThread, *arguments: Any) -> None:
        time.sleep(0.2)  # the run waits for its first batch by now
        work(thread, *arguments)

    monkeypatch.setattr(SamplingThread, "_work", late)
    workers = Timed()
    run = threading.Thread(target=overlapped, args=(tmp_path, workers), daemon=True)
    run.start()
    run.join(PATIENCE_S)
    assert not run.is_alive(), "it waits for a batch that nobody samples"
    assert len(updated(workers)) == 6


def test_what_fails_while_sampling_ends_the_run(tmp_path: Path) -> None:
    def hold(workers: Timed, seed_name: str) -> None:
        if seed_name == "step 3":
            raise RuntimeError("no rollout engine is left")

    workers = Timed(hold=hold)
    with pytest.raises(RuntimeError, match="no rollout engine is left"):
        overlapped(tmp_path, workers)
    assert len(updated(workers)) == 3
    assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]


def test_what_fails_while_learning_ends_the_sampling(tmp_path: Path) -> None:
    def hold(workers: Timed, seed_name: str) -> None:
        if seed_name == "step 2":
            until(lambda: workers.interrupted)

    class Failing(Timed):
        def update(self, *arguments: Any, seed: int) -> tuple[Metrics, Tensor]:
            if len(updated(self)) == 1:
                raise RuntimeError("a worker died")
            return super().update(*arguments, seed=seed)

    with pytest.raises(RuntimeError, match=r"the update of step 1 failed.*a worker died"):
        overlapped(tmp_path, Failing(hold=hold))
    assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]


def test_the_overlap_is_measured(tmp_path: Path) -> None:
    class Sleepy(Timed):
        def update(self, *arguments: Any, seed: int) -> tuple[Metrics, Tensor]:
            time.sleep(0.2)
            return super().update(*arguments, seed=seed)

    workers = overlapped(tmp_path, Sleepy(hold=lambda *_: time.sleep(0.2)), "steps=5")
    overlaps = [call.of["metrics"]["ahead/overlap"] for call in workers.asked("log")]
    assert overlaps[0] == pytest.approx(1, abs=0.2), "the first batch has nothing to overlap with"
    assert all(1.25 < overlap < 2.05 for overlap in overlaps[1:]), "in turns it would be 1"
    for call in workers.asked("log"):
        metrics = call.of["metrics"]
        assert 0.2 <= metrics["ahead/generate_s"] < 0.6
        assert metrics["throughput/generate_tokens_per_s"] > 0
