"""The code of docs/other_trainers.md runs. tests/integrations tests the modules that the page names."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sae_rl.algo import segmental_advantages

PAGE = (Path(__file__).parents[2] / "docs" / "other_trainers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
B, T = 6, 30


def test_the_call() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "rewards": torch.zeros(B, T).index_fill(1, torch.tensor([T - 1]), 1.0),
        "values": torch.rand(B, T, generator=draw),
        "logprobs": torch.rand(B, T, generator=draw).log(),
        "mask": torch.rand(B, T, generator=draw) < 0.8,
    }
    names: dict[str, Any] = dict(inputs)
    (block,) = [code for code in BLOCKS if code.startswith("from sae_rl.algo")]
    exec(block, names)
    expected = segmental_advantages(**inputs)
    assert torch.equal(names["advantages"], expected[0]) and torch.equal(names["returns"], expected[1])


def test_the_modules_and_their_versions() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) to ([\d.]+) \| .*(sae_rl\.integrations\.\w+)", PAGE, flags=re.MULTILINE)
    assert len(rows) == 3
    for trainer, first, last, module in rows:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        assert f'check_version("{trainer.lower()}", "{first}", "{last}")' in Path(spec.origin).read_text()
