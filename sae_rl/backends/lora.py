"""Low-rank adapters on a frozen policy (peft; arXiv 2106.09685), and the weights that the two make together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sae_rl.config.schema import LoraConfig

ADAPTER = "default"


def add_adapters(causal_lm: Any, lora: LoraConfig) -> None:
    """Freezes the model and gives its layers adapters, in place; they start out as doing nothing.

    Raises:
        ValueError: ``lora.target_modules`` names layers that the model does not have.
    """
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=_targets(lora), bias="none", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same on every rank
        inject_adapter_in_model(config, causal_lm, adapter_name=ADAPTER)


def _targets(lora: LoraConfig) -> str | list[str]:
    return lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)


@contextlib.contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """The frozen model alone."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a network as it is without adapters, or with them merged in."""

    name: str
    parameters: list[nn.Parameter]  # what it is made of; under ZeRO 3 they must be gathered before `read`
    read: Callable[[], Tensor]


def merged_weights(network: nn.Module) -> list[Weight]:
    """Every parameter, each adapter within the matrix that it adapts."""
    adapted = {
        f"{name}.base_layer.weight": module
        for name, module in network.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    inside = tuple(f"{name.removesuffix('base_layer.weight')}lora_" for name in adapted)
    weights = []
    for name, parameter in network.named_parameters():
        if inside and name.startswith(inside):
            continue
        if name in adapted:
            layer: Any = adapted[name]
            parts = [parameter, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
            read = _merged(layer, parameter)
        else:
            parts, read = [parameter], _plain(parameter)
        weights.append(Weight(name.replace(".base_layer.", "."), parts, read))
    return weights


def _plain(parameter: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: parameter.data


def _merged(layer: Any, parameter: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: parameter.data + layer.get_delta_weight(ADAPTER).detach().to(parameter.dtype)
