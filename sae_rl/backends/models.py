"""Policy and critic networks: Hugging Face causal language models that answer per response token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_rl.backends.attention import PACKED_SDPA
from sae_rl.backends.logprobs import OutputHead
from sae_rl.backends.packing import MicroBatch
from sae_rl.config import ModelConfig

ATTENTION = {"sdpa": PACKED_SDPA}  # the others know packed rows
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(model: ModelConfig) -> Any:
    """The Hugging Face model of ``model.path``, without dropout or a KV cache."""
    network = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=DTYPES[model.precision], attn_implementation=ATTENTION.get(model.attention, model.attention)
    )
    network.config.use_cache = False
    return network


class PolicyNetwork(nn.Module):
    """log pi(a_t | s_t) of response tokens. The output layer runs on response positions only."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        OutputHead.of(causal_lm)
        self.causal_lm = causal_lm

    def forward(self, micro: MicroBatch, temperature: float, with_entropies: bool) -> tuple[Tensor, Tensor | None]:
        """
        Returns:
            logprobs (n,) and entropies (n,), float32; entropies None unless asked for.
        """
        hidden = _hidden_states(self.causal_lm.base_model, micro)
        head = self.causal_lm.get_output_embeddings()
        logprobs, entropies = head(hidden[micro.state_index], micro.token_ids, temperature, with_entropies)
        return logprobs, entropies if with_entropies else None


class CriticNetwork(nn.Module):
    """V(s_t) of response tokens: the policy's architecture and weights below a linear head that starts at zero."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.backbone = causal_lm.base_model
        self.value_head = nn.Linear(causal_lm.config.hidden_size, 1, dtype=causal_lm.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, micro: MicroBatch, with_final: bool = False) -> tuple[Tensor, Tensor | None]:
        """
        Returns:
            values (n,) and, at the last token of each response, the value (n,) of the state behind it, 0 elsewhere;
            float32, the second None unless asked for.
        """
        hidden = _hidden_states(self.backbone, micro)
        values = self.value_head(hidden[micro.state_index]).squeeze(-1).float()
        if not with_final:
            return values, None
        final = self.value_head(hidden[micro.final_index]).squeeze(-1).float()
        return values, torch.zeros_like(values).index_copy(0, micro.counts.cumsum(0) - 1, final)


def _hidden_states(backbone: nn.Module, micro: MicroBatch) -> Tensor:
    """(L, hidden), each sequence by itself."""
    found = backbone(input_ids=micro.input_ids, position_ids=micro.position_ids, **micro.attention_arguments())
    states: Tensor = found.last_hidden_state
    return states[0]


def export_causal_lm(causal_lm: Any, weights: Iterable[tuple[str, Tensor]], base: str, folder: Path) -> None:
    """Writes a folder that transformers and vLLM load: weights, configuration, and the tokenizer of ``base``.

    Args:
        causal_lm: the model whose architecture is written.
        weights: (name, full tensor) of `PolicyNetwork`'s parameters, one at a time.
        base: folder or hub name that the tokenizer comes from.
        folder: written whole or not at all is the caller's care.
    """
    state = {name.removeprefix("causal_lm."): tensor.detach().cpu().clone() for name, tensor in weights}
    causal_lm.save_pretrained(folder, state_dict=state)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
