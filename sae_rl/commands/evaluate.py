"""``sae-rl evaluate``: scores a model on held-out prompts."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sae_rl.analysis.samples_page import write_samples_page
from sae_rl.commands.assemble import reward_pool
from sae_rl.commands.preflight import prepared, show_outline
from sae_rl.config.schema import Config
from sae_rl.evaluation.evaluate import evaluate
from sae_rl.evaluation.files import publish, unpublished, write_evaluation
from sae_rl.records.clock import Clock
from sae_rl.workers.session import ray_session, start_workers


def run_evaluation(config: Config) -> Path | None:
    """Samples ``model.path`` on the prompts of ``task.evaluation`` and scores the responses.

    Returns:
        A new folder in ``output_dir/evaluation`` with the metrics and every sample; None with ``dry_run``.

    Raises:
        ConfigError: as in `run_training`.
        WorkerError, RuntimeError: the evaluation failed; nothing was written.
    """
    ready, clock = prepared(config, ["rollout"]), Clock()
    if config.dry_run:
        show_outline(ready)
        return None
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_session(config))
        workers = stack.enter_context(start_workers(config, [], clock, ready.roles))
        rewards = stack.enter_context(reward_pool(config.rewards))
        with clock.phase("evaluate"):
            result = evaluate(ready.heldout, workers.rollout, rewards, clock, ready.resolved)
    with unpublished(config.output_dir) as folder:
        write_evaluation(folder, config, result, clock.so_far()["time/evaluate_s"])
        write_samples_page(folder, lambda ids: str(ready.tokenizer.decode(ids, skip_special_tokens=True)))
        return publish(folder, config.model.path)
