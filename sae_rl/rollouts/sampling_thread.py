"""A thread that samples the next steps while the driver trains on this one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from sae_rl.records.clock import Clock
from sae_rl.rollouts.groups import StepSamples
from sae_rl.rollouts.partial import PartialRollouts
from sae_rl.rollouts.step import sample_step
from sae_rl.run import Run

STOP_S = 30.0  # how long the end of a run waits for the thread to notice it


class SamplingThread:
    """Samples step after step, each as soon as the engines' weights are new enough for it.

    The batch of step s is begun by weights of version s - ``schedule.max_staleness`` or later. A step that follows an
    evaluation waits for it, since both use the same engines.

    - Produces: the samples of each step, for `take`.
    - Waits for: `set_version`, which says what weights the engines have.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self._run, self._first_step = run, first_step
        self._steps = range(first_step, run.config.steps)
        self._schedule = run.config.schedule
        self._is_partial = run.config.rollout.prompts_under_way is not None
        self._pending: dict[int, Future[StepSamples]] = {step: Future() for step in self._steps}  # until taken
        self._version = first_step
        self._changed = threading.Condition()
        self._stopped = False
        # The thread gets a copy, since the driver may take the first step before the thread runs.
        self._thread = threading.Thread(target=self._work, args=(dict(self._pending),), name="sampling", daemon=True)

    def __enter__(self) -> SamplingThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._run.workers.rollout.interrupt()
        self._thread.join(STOP_S)

    def take(self, step: int) -> StepSamples:
        """Waits for the samples of this step. An exception of the thread is raised here."""
        with self._run.clock.phase("wait"):
            return self._pending.pop(step).result()

    def drain(self) -> None:
        """Waits for the steps that the engines work on, unless responses may continue under new weights."""
        if self._schedule.weight_updates == "in_flight":
            return
        with self._run.clock.phase("wait"):
            for step, samples in self._pending.items():
                if self._needed_version(step) <= self._version:
                    samples.result()

    def set_version(self, version: int) -> None:
        """Says that the engines have weights of this version and that no evaluation needs the engines."""
        with self._changed:
            self._version = version
            self._changed.notify_all()

    def _needed_version(self, step: int) -> int:
        """The version of the weights that may begin this step."""
        every = self._run.config.evaluation.every_steps
        last_evaluation = step // every * every if every else 0
        left_over = 1 if self._is_partial else 0  # responses that a step leaves over become one step older
        return max(step - self._schedule.max_staleness + left_over, last_evaluation, self._first_step)

    def _work(self, pending: dict[int, Future[StepSamples]]) -> None:
        try:
            for step, samples in self._sampled():
                pending.pop(step).set_result(samples)
        except BaseException as error:  # the driver waits for these steps and must learn of any failure
            for samples_of_step in pending.values():
                samples_of_step.set_exception(error)

    def _sampled(self) -> Iterator[tuple[int, StepSamples]]:
        clock = Clock()
        run = replace(self._run, clock=clock)
        sample = PartialRollouts(run).sample_step if self._is_partial else partial(sample_step, run)
        for step in self._steps:
            with self._changed:
                while not self._stopped and self._needed_version(step) > self._version:
                    self._changed.wait()
                if self._stopped:
                    return
            clock.lap()
            samples = sample(step)
            times = clock.lap()
            spent = {f"ahead/{phase}_s": times[f"time/{phase}_s"] for phase in ("generate", "reward")}
            yield step, replace(samples, metrics=samples.metrics | spent)
