"""Made-up runs: folders with a real configuration, metrics written through `Records`, and scores of held-out prompts."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import yaml

from sae_rl.comparison.curves import RunCurves
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config, as_tree
from sae_rl.records.records import Records

STEPS, EVERY = 12, 3


@cache
def make_config(*overrides: str) -> Config:
    return load_config(
        [
            *(
                "experiment=demo",
                f"steps={STEPS}",
                f"evaluation.every_steps={EVERY}",
                "logger=off",
                "logger.jsonl=true",
            ),
            *("model.path=nobody/nothing", "model.context_tokens=1024", *overrides),
        ]
    )


def write_run(
    folder: Path,
    *overrides: str,
    seed: int = 0,
    gain: float = 0.5,
    done: int = STEPS,
    num_prompts: int = 0,
    evaluated: bool = True,
    **more: Any,
) -> Path:
    """A run whose held-out success rises by ``gain`` from 0.2, with noise of its seed; ``more`` are keys of config.yaml.

    Args:
        done: steps that were done; fewer than all: it was stopped.
        num_prompts: whose scores are recorded; 0: none are.
    """
    config = make_config(*overrides).model_copy(update={"output_dir": folder, "seed": seed})
    rng = np.random.default_rng([seed, num_prompts])
    noise = rng.normal(0, 0.03)
    difficulty = rng.uniform(-0.2, 0.2, max(num_prompts, 1))
    with Records(config, folder, first_step=0) as records:
        for step in range(done + 1):
            success = float(
                np.clip(0.2 + (gain + noise) * (1 - math.exp(-3 * step / STEPS)) + rng.normal(0, 0.01), 0, 1)
            )
            if evaluated and (step % EVERY == 0 or step == config.steps):
                if num_prompts:
                    right = (rng.random((num_prompts, 2)) < np.clip(success + difficulty, 0, 1)[:, None]).astype(float)
                    success = float(right.mean())
                    write_scores(folder, step, right)
                records.log(step, {"evaluation/success_mean": success, "evaluation/num_prompts": 64.0}, "evaluation")
            if step < done:
                records.log(step, training_metrics(step, success, rng))
    tree = as_tree(config) | more
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder


def training_metrics(step: int, success: float, rng: np.random.Generator) -> dict[str, float]:
    phases = {"time/generate_s": 4.0 + rng.random(), "time/update_s": 2.0, "time/driver_s": 0.5}
    return {
        "rollout/reward_mean": success,
        "rollout/tokens_mean": 250.0 + 2 * step,
        "critic/explained_variance": 0.1 + 0.02 * step + 0.05 * rng.random(),
        "policy/entropy_mean": 0.2 - 0.01 * step,
        "segment/per_response_mean": 12.0 - 0.3 * step,
        "segment/opens_fraction": 0.045 - 0.001 * step,
        "policy/grad_norm": 0.03 + 0.01 * rng.random() if step else math.nan,
        **phases,
        "time/step_s": sum(phases.values()),
    }


def write_scores(folder: Path, step: int, scores: np.ndarray[Any, Any]) -> None:
    """The columns of recorded samples that a comparison reads; (prompts, samples) scores, of two data sets."""
    num_prompts, n = scores.shape
    names = [(("level", "other")[p % 2], f"{p:04d}") for p in range(num_prompts) for _ in range(n)]
    data_sets, ids = zip(*names, strict=True)
    file = folder / "evaluation" / f"step_{step:06d}.parquet"
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"data_set": data_sets, "prompt_id": ids, "reward": scores.ravel()}), file)


def curves_of(success: dict[int, float], *, arm: str = "a", seed: str = "0", **more: Any) -> RunCurves:
    """A run in memory, with the learning curve ``success``."""
    values: dict[str, Any] = {
        "source": Path(f"{arm}-{seed}"),
        "task": "level",
        "held_out": "level",
        "steps": max(success, default=0),
        "training": {"sampled_tokens": dict.fromkeys(range(max(success, default=0)), 100.0)},
        "success": success,
    }
    return RunCurves(arm=arm, seed=seed, **(values | more))
