"""The tables of docs/exactness.md, which tests fill and `make exactness` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor  # conftest.py imports this module before it sets the number of threads for torch

HEADER = """# Exactness

Written by `make exactness`. The reference is transformers' own model in float32 with eager attention, on the same sequences,
one per row and right-padded, with PPO's losses written out over it. It shares no code with `sae_rl`. Each number is the
largest absolute difference over all tokens, or over all elements of all parameters; the tests demand less than 1e-5.
"Gradient" is the gradient of one update as the optimizer receives it. "varlen" ran torch's wrapper and its derivatives on
kernels for a CPU, not on a GPU.
"""


@dataclass
class Exactness:
    """Tables by title, rows by name, figures by column."""

    tables: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict)

    def record(self, table: str, row: str, figures: Mapping[str, float]) -> None:
        self.tables.setdefault(table, {})[row] = figures

    def page(self) -> str:
        parts = [HEADER]
        for title, rows in self.tables.items():
            names = list(next(iter(rows.values())))
            head = [f"| {' | '.join(['', *names])} |", "|" + "---|" * (1 + len(names))]
            lines = [f"| {row} | {' | '.join(f'{f[n]:.1e}' for n in names)} |" for row, f in rows.items()]
            parts.append("\n".join([f"## {title}", "", *head, *lines, ""]))
        return "\n".join(parts)


FIGURES = pytest.StashKey[Exactness]()


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference of two tensors. Asserts that their shapes are the same and all elements finite."""
    assert found.shape == expected.shape and bool(found.isfinite().all())
    return float((found.detach() - expected.detach()).abs().max())


def write(config: pytest.Config) -> None:
    target = config.getoption("--exactness")
    if target is not None and config.stash[FIGURES].tables:
        Path(target).write_text(config.stash[FIGURES].page())
