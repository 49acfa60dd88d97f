"""The overlapped schedule: while a step trains, a thread samples the next one's responses from the weights it has.

So a step takes the longer of sampling and learning instead of both, and its responses are up to ``max_staleness`` steps
older than the policy that learns from them; `ImportanceCorrection` weighs their tokens accordingly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from types import TracebackType

from sae_rl.driver import Run, begin, evaluate_if_due, finish, learn, sample_step
from sae_rl.protocols import Metrics
from sae_rl.records.clock import Clock
from sae_rl.records.metrics import PHASES
from sae_rl.rollouts.groups import FailedRule, StepSamples
from sae_rl.rollouts.partial import PartialRollouts

STOP_S = 30.0  # for the sampling thread to notice that the run ended


def train_overlapped(run: Run) -> None:
    """Every step that is left of a run.

    Raises:
        RuntimeError: rewards, weights or a worker failed; the last checkpoint stays usable.
    """
    first = begin(run)
    with SamplingThread(run, first) as ahead:
        for step in range(first, run.config.steps):
            samples = ahead.take(step)  # y ~ pi_rollout(. | x) of an earlier step, and R(x, y)
            result = learn(run, step, samples)  # pi_theta and V
            ahead.before_sync()
            synced = run.workers.sync_weights(step + 1)  # pi_rollout <- pi_theta
            evaluate_if_due(run, step + 1)
            ahead.allow(step + 1)
            finish(run, step, samples, result, synced | overlap(run.clock.so_far(), samples.metrics))


def overlap(times: Metrics, samples: Metrics) -> Metrics:
    """How much more was done than a single line of phases could have."""
    phases = sum(times[name] for name in PHASES if name in times) - times["time/wait_s"]
    return {"ahead/overlap": (phases + samples["ahead/generate_s"] + samples["ahead/reward_s"]) / times["time/step_s"]}


class SamplingThread:
    """A thread that gathers step after step, each as soon as the weights are new enough for it.

    The batch of step s is begun by weights of version s - ``max_staleness`` or later. Where an evaluation comes before step
    s, its sampling waits for that: both use the same engines.
    """

    def __init__(self, run: Run, first: int) -> None:
        self._run, self._first = run, first
        self._steps = range(first, run.config.steps)
        self._schedule = run.config.schedule
        self._is_partial = run.config.rollout.prompts_under_way is not None
        self._batches: dict[int, Future[StepSamples]] = {step: Future() for step in self._steps}  # until they are taken
        self._version = first
        self._changed = threading.Condition()
        self._stopped = False
        # A copy, as the first batch may be taken before the thread runs.
        self._thread = threading.Thread(
            target=self._gather_all, args=(dict(self._batches),), name="sampling", daemon=True
        )

    def __enter__(self) -> SamplingThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._run.workers.rollout.interrupt()
        self._thread.join(STOP_S)

    def take(self, step: int) -> StepSamples:
        """The batch of this step. Raises what sampling it raised."""
        with self._run.clock.phase("wait"):
            return self._batches.pop(step).result()

    def before_sync(self) -> None:
        """Drained weight updates: waits for the batches that the engines work at; those in flight do not."""
        if self._schedule.weight_updates == "in_flight":
            return
        with self._run.clock.phase("wait"):
            for coming, batch in self._batches.items():
                if self._needed(coming) <= self._version:
                    batch.result()

    def allow(self, version: int) -> None:
        """The engines have these weights, and no evaluation needs them."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def _needed(self, step: int) -> int:
        """The version that this step's batch waits for."""
        every = self._run.config.evaluation.every_steps
        evaluated = step // every * every if every else 0
        carried = 1 if self._is_partial else 0  # responses that are left over become one step older
        return max(step - self._schedule.max_staleness + carried, evaluated, self._first)

    def _gatherer(self, run: Run) -> Callable[[int], StepSamples]:
        if not self._is_partial:
            return partial(sample_step, run)
        rule = FailedRule.of(run.config)
        return PartialRollouts(
            run.sampler, run.workers.rollout, run.rewards, run.clock, run.config.rollout, rule
        ).sample_step

    def _gather_all(self, batches: dict[int, Future[StepSamples]]) -> None:
        try:
            for step, samples in self._gathered():
                batches.pop(step).set_result(samples)
        except BaseException as error:  # whoever waits for a batch has to know, whatever it is
            for batch in batches.values():
                batch.set_exception(error)

    def _gathered(self) -> Iterator[tuple[int, StepSamples]]:
        clock = Clock()
        gather_step = self._gatherer(replace(self._run, clock=clock))
        for step in self._steps:
            with self._changed:
                while not self._stopped and self._needed(step) > self._version:
                    self._changed.wait()
                if self._stopped:
                    return
            clock.lap()
            samples = gather_step(step)
            times = clock.lap()
            spent = {f"ahead/{phase}_s": times[f"time/{phase}_s"] for phase in ("generate", "reward")}
            yield step, replace(samples, metrics=samples.metrics | spent)
