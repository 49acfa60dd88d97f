"""The overlapped schedule: a thread samples the next steps while the driver trains on this one.

A step then takes the longer of sampling and training instead of their sum. Its responses are up to
``schedule.max_staleness`` steps older than the policy that trains on them, and `ImportanceCorrection` weighs their tokens.
"""

from __future__ import annotations

from sae_rl.driver import begin, evaluate_if_due, finish, learn
from sae_rl.records.step_metrics import overlap
from sae_rl.rollouts.sampling_thread import SamplingThread
from sae_rl.run import Run


def train_overlapped(run: Run) -> None:
    """Runs every remaining step.

    Raises:
        RuntimeError: rewards, weights or a worker failed; the last checkpoint stays usable.
    """
    first_step = begin(run)
    with SamplingThread(run, first_step) as thread:
        for step in range(first_step, run.config.steps):
            samples = thread.take(step)  # y ~ pi_rollout(. | x) of an earlier step, and R(x, y)
            result = learn(run, step, samples)  # pi_theta and V
            thread.drain()
            synced = run.workers.sync_weights(step + 1)  # pi_rollout <- pi_theta
            evaluated = evaluate_if_due(run, step + 1)
            thread.set_version(step + 1)
            overlapping = overlap(run.clock.so_far(), samples.metrics)
            finish(run, step, samples, result, synced | overlapping, evaluated)
