"""The doctor's verdicts on nodes, and its small model. tests/stack/test_doctor.py runs it as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sae_rl.commands import doctor
from sae_rl.commands.doctor import Checks, check_nodes, shrunk_model
from sae_rl.workers.nodes import NodeFacts

SOUND = NodeFacts(
    host="a",
    cores=16,
    memory_gib=128.0,
    free_gib=500.0,
    gpus=("H200 (143771 MiB, driver 580.1)",) * 8,
    versions={"python": "3.11.7", "torch": "2.13.0", "nccl": "2.28.9"},
    nonce="of a",
    connection=None,
)


def checked(monkeypatch: pytest.MonkeyPatch, folder: Path, *answers: NodeFacts | str) -> tuple[list[str], list[str]]:
    """The checks that fail, and all lines; every node but those on another disk has left its file."""

    def answer(output: Path, nonce: Path, limit_s: float) -> list[NodeFacts | str]:
        for name in ("of a", "of b"):
            (nonce / name).touch()
        return list(answers)

    monkeypatch.setattr(doctor, "facts_of_nodes", answer)
    lines: list[str] = []
    checks = Checks(lines.append)
    check_nodes(checks, folder)
    return [name for name in checks.failed if name != "sandbox"], lines


@pytest.mark.parametrize(
    ("changed", "failed", "said"),
    [
        ({}, [], "a: 16 cores, 128 GiB, 8 x H200 (143771 MiB, driver 580.1), 500 GiB free for output_dir"),
        (
            {"versions": {"python": "3.11.7", "torch": "2.12.0", "nccl": "2.28.9"}},
            ["packages"],
            "2.13.0 on a, 2.12.0 on b",
        ),
        ({"versions": {"python": "3.11.7", "torch": "2.13.0"}}, ["packages"], "nccl: 2.28.9 on a, missing on b"),
        ({"nonce": None}, ["shared storage"], "b and the driver do not see each other's files"),
        ({"nonce": "of another disk"}, ["shared storage"], "b and the driver do not see each other's files"),
        ({"free_gib": 1.0}, ["shared storage"], "little space for checkpoints: b: 1.0 GiB"),
        ({"connection": "10.0.0.1:4711: timed out"}, ["ports"], "b: 10.0.0.1:4711: timed out"),
    ],
)
def test_what_is_wrong_with_a_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, Any], failed: list[str], said: str
) -> None:
    found, lines = checked(monkeypatch, tmp_path, SOUND, replace(SOUND, **{"host": "b", "nonce": "of b"} | changed))
    assert found == failed
    assert said in "\n".join(lines)


def test_a_node_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, lines = checked(monkeypatch, tmp_path, SOUND, "b did not answer in time")
    assert found == ["nodes"]
    assert lines[0].startswith("failed          nodes: b did not answer in time\n") and "->" in lines[0]


def test_the_small_model_has_the_same_architecture(tiny_model: Path) -> None:
    model, real = shrunk_model(str(tiny_model), multiple=6), AutoConfig.from_pretrained(tiny_model)
    config: Any = model.config
    assert (config.model_type, config.vocab_size, config.head_dim) == (real.model_type, real.vocab_size, real.head_dim)
    assert config.num_hidden_layers == 2 and config.num_attention_heads % 6 == config.num_key_value_heads % 6 == 0
    assert len(config.layer_types) == 2
