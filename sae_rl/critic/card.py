"""The card of a pre-trained critic: which returns its values predict. It lies beside the critic's Hugging Face files."""

from __future__ import annotations

import json
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from sae_rl.config.schema import Config, as_tree
from sae_rl.settings import ConfigError

CARD = "critic.json"
# The keys that decide the distribution of responses and rewards, and so the values of states.
MEANING = (
    "model.path",
    "task.train",
    "rollout.max_response_tokens",
    "rollout.temperature",
    "algorithm.estimator",
    "algorithm.token_rewards",
    "algorithm.bootstrap_truncated",
)


def write_card(folder: Path, config: Config, explained_variance: float, num_responses: int) -> None:
    card = {
        "explained_variance": explained_variance,  # on held-out prompts
        "num_responses": num_responses,
        "settings": _settings(config),
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def describe(config: Config) -> str:
    """Describes ``learner.critic_pretraining.checkpoint``, and the settings in which this run differs from its maker.

    Raises:
        ConfigError: the folder holds no critic, or a critic for another model.
    """
    key, folder = "learner.critic_pretraining.checkpoint", Path(config.learner.critic_pretraining.checkpoint or "")
    shape = _read(folder / "config.json", key)
    if not any(name.endswith("ForTokenClassification") for name in shape.get("architectures") or ()):
        found = f"{key} = {folder} holds {shape.get('architectures')}, but a critic is a token classifier"
        raise ConfigError([f"{found}; make one with `sae-rl pretrain-critic`"])
    model = Path(config.model.path) / "config.json"
    if model.exists() and shape["vocab_size"] != (ours := _read(model, "model.path")["vocab_size"]):
        raise ConfigError([f"{key} = {folder} knows {shape['vocab_size']} tokens, but {config.model.path} {ours}"])
    if not (folder / CARD).exists():
        return f"critic from {folder}"
    card = _read(folder / CARD, key)
    before, now = card["settings"], _settings(config)
    changes = [
        f"{name} {before.get(name)!r} there, {now[name]!r} here" for name in MEANING if before.get(name) != now[name]
    ]
    told = (
        f"critic from {folder}: held-out explained variance {card['explained_variance']:.3f} after pre-training on "
        f"{card['num_responses']} responses"
    )
    return f"{told}; made with other settings: {'; '.join(changes)}" if changes else told


def _settings(config: Config) -> dict[str, Any]:
    tree = as_tree(config)
    return {name: reduce(getitem, name.split("."), tree) for name in MEANING}


def _read(file: Path, key: str) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"{key}: {file} cannot be read ({error})"]) from error
    return read
