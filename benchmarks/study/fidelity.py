"""The commands that measure all arms on checkpoints of the study: `sae-rl correlate` with the arms as its estimators."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product

from omegaconf import OmegaConf

from benchmarks.study.matrix import Matrix, Run
from sae_rl.config.compose import compose_tree

PARTS = ("segmenter", "value_source", "estimator")


def commands(matrix: Matrix) -> Iterator[tuple[str, ...]]:
    """The words of ``sae-rl`` for each run of ``fidelity`` in the matrix, at its first, middle and last step.

    All arms begin from the same models, so step 0 is measured for the first one alone.
    """
    chosen = matrix.fidelity
    size, overrides = chosen["size"], {task: estimators(matrix, task) for task in chosen["tasks"]}
    for seed, task, arm in product(chosen["seeds"], chosen["tasks"], chosen["arms"]):
        run = Run(arm, task, size, seed)
        steps = compose_tree(matrix.train(run)[1:]).steps
        for step in (0, steps // 2, steps) if arm == chosen["arms"][0] else (steps // 2, steps):
            yield (
                "correlate",
                f"correlation.checkpoint={matrix.output(run) / 'checkpoints' / f'step_{step:06d}'}",
                f"output_dir={matrix.folder / 'fidelity' / f'{run.name}--{step}'}",
                f"correlation.boundaries=[{next(iter(matrix.arms))}]",
                *overrides[task],
            )


def estimators(matrix: Matrix, task: str) -> list[str]:
    """Overrides that put the arms, with their constants for a task, in place of the estimators of ``conf/``.

    An arm with several critics is left out: the measured runs have one.
    """
    found = ["correlation.estimators=null"]
    for arm in matrix.arms:
        tree = compose_tree(matrix.train(Run(arm, task, matrix.fidelity["size"], 0))[1:])
        parts = OmegaConf.to_container(OmegaConf.masked_copy(tree.algorithm, list(PARTS)), resolve=True)
        if parts["value_source"].get("num_critics", 1) == 1:  # type: ignore[index, call-overload, union-attr]
            # Hydra takes JSON, but for the quotes of keys.
            found.append(f"+correlation.estimators.{arm}=" + re.sub(r'"(\w+)":', r"\1:", json.dumps(parts)))
    return found
