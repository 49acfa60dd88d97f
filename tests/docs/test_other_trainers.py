"""The code of docs/other_trainers.md runs and computes SAE. Stand-ins call it as the real trainers do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_rl.algo import Whitening, segmental_advantages

PAGE = (Path(__file__).parents[2] / "docs" / "other_trainers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
B, T = 6, 30


def block(starts: str) -> str:
    (found,) = [code for code in BLOCKS if code.startswith(starts)]
    return found


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(B, T, generator=draw) < 0.8
    rewards = torch.zeros(B, T).index_fill(1, torch.tensor([T - 1]), 1.0)
    values, logprobs = torch.rand(B, T, generator=draw), torch.rand(B, T, generator=draw).log()
    return {"rewards": rewards, "values": values, "logprobs": logprobs, "mask": mask}


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """Registers a module and its parents in sys.modules until the test ends."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if end > 1:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    for member, value in members.items():
        setattr(module, member, value)
    return module


def test_the_call(inputs: dict[str, Tensor]) -> None:
    names: dict[str, Any] = dict(inputs)
    exec(block("from sae_rl.algo"), names)
    expected = segmental_advantages(**inputs)
    assert torch.equal(names["advantages"], expected[0]) and torch.equal(names["returns"], expected[1])


def test_verl(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Tensor]) -> None:
    utils = install(monkeypatch, "verl.trainer.ppo.v1.utils")
    exec(block("# sae_in_verl.py"), {})
    batch = {
        "token_level_rewards": inputs["rewards"],
        "values": inputs["values"],
        "rollout_log_probs": inputs["logprobs"],
        "response_mask": inputs["mask"].long(),
    }
    data = SimpleNamespace(batch=batch)
    arguments = {"num_repeat": 2, "norm_adv_by_std_in_grpo": True, "config": None}
    assert utils.compute_advantage(data, adv_estimator="gae", gamma=1.0, lam=0.9, **arguments) is data
    advantages, returns = segmental_advantages(**inputs, lam=0.9)
    whitened = Whitening()(advantages.flatten(), inputs["mask"].flatten()).view(B, T)
    assert torch.equal(batch["returns"], returns) and torch.equal(batch["advantages"], whitened)


def test_openrlhf(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Tensor]) -> None:
    class RemoteExperienceMaker:
        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            for e in experiences:
                e.advantages, e.returns = self.get_advantages_and_returns(e.values, e.reward, e.action_mask, 1.0, 0.9)
            return experiences

        def get_advantages_and_returns(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            raise AssertionError("the original method must not be called")

    trainer = install(monkeypatch, "openrlhf.trainer.ppo_trainer", RemoteExperienceMaker=RemoteExperienceMaker)
    names: dict[str, Any] = {}
    exec(block("# sae_in_openrlhf.py"), names)
    names["install"]()
    assert trainer.RemoteExperienceMaker is not RemoteExperienceMaker
    parts = [
        SimpleNamespace(
            values=inputs["values"][rows],
            reward=inputs["rewards"][rows],
            action_mask=inputs["mask"][rows],
            rollout_log_probs=inputs["logprobs"][rows],
        )
        for rows in (slice(0, 4), slice(4, 6))
    ]
    done = trainer.RemoteExperienceMaker().compute_advantages_and_returns(parts)
    expected = segmental_advantages(**inputs, lam=0.9)
    for name, tensor in zip(("advantages", "returns"), expected, strict=True):
        assert torch.equal(torch.cat([getattr(part, name) for part in done]), tensor)


def test_trl(inputs: dict[str, Tensor]) -> None:
    """TRL's rewards stand after the last token. Without inner segments the result equals TRL's own loop with lambda = 1."""
    ends = torch.randint(3, T - 2, (B, 1))
    positions = torch.arange(T).expand(B, T)
    padding_mask, padding_mask_p1 = positions > ends, positions > ends + 1
    rewards = torch.zeros(B, T).scatter(1, ends + 1, 1.0)
    values = inputs["values"].masked_fill(padding_mask_p1, 0.0)
    whitening = Whitening()
    names: dict[str, Any] = {
        "torch": torch,
        "segmental_advantages": segmental_advantages,
        "masked_whiten": lambda flat, mask: whitening(flat.flatten(), mask.flatten()).view(B, T),
        "args": SimpleNamespace(lam=0.9, gamma=0.97),
        "rewards": rewards,
        "values": values,
        "logprobs": torch.zeros(B, T).masked_fill(padding_mask, 1.0),
        "padding_mask": padding_mask,
        "padding_mask_p1": padding_mask_p1,
    }
    exec(block("# in PPOTrainer.train"), names)
    carried, columns = torch.zeros(B), []
    for t in range(T - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < T else torch.zeros(B)
        carried = rewards[:, t] + 0.97 * following - values[:, t] + 0.97 * carried
        columns.append(carried)
    expected = whitening(torch.stack(columns[::-1], 1).flatten(), ~padding_mask.flatten()).view(B, T)
    torch.testing.assert_close(names["advantages"], expected, atol=1e-5, rtol=1e-5)
