"""Policy and critic networks: Hugging Face causal language models that answer per response token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from sae_rl.backends.attention import PACKED_SDPA
from sae_rl.backends.logprobs import OutputHead
from sae_rl.backends.packing import MicroBatch
from sae_rl.backends.sequence_parallel import ULYSSES, SequenceGroup
from sae_rl.config.schema import ModelConfig

ATTENTION = {"sdpa": PACKED_SDPA}  # the others know packed rows
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(model: ModelConfig, group: SequenceGroup | None = None) -> Any:
    """The Hugging Face model of ``model.path``, without dropout or a KV cache; ``group`` shares its rows."""
    return _load(AutoModelForCausalLM, model.path, model, group)


def _load(kind: Any, path: str, model: ModelConfig, group: SequenceGroup | None, **arguments: Any) -> Any:
    attention = ATTENTION.get(model.attention, model.attention)
    if group is not None:
        group.attend_with(AutoConfig.from_pretrained(path), attention)
        attention = ULYSSES
    network = kind.from_pretrained(path, dtype=DTYPES[model.precision], attn_implementation=attention, **arguments)
    network.config.use_cache = False
    return network


class PolicyNetwork(nn.Module):
    """log pi(a_t | s_t) of response tokens. The output layer runs on response positions only."""

    def __init__(self, causal_lm: Any, group: SequenceGroup | None = None, *, fused: bool = False) -> None:
        super().__init__()
        OutputHead.of(causal_lm, fused)
        self.causal_lm = causal_lm
        self._group = group

    def forward(self, micro: MicroBatch, temperature: float, with_entropies: bool) -> tuple[Tensor, Tensor | None]:
        """
        Returns:
            logprobs (n,) and entropies (n,), float32; entropies None unless asked for.
        """
        own = micro if self._group is None else self._group.stretch_of(micro)
        hidden = _hidden_states(self.causal_lm.base_model, own)
        head = self.causal_lm.get_output_embeddings()
        logprobs, entropies = head(hidden[own.state_index], own.token_ids, temperature, with_entropies)
        logprobs = _of_all_states(logprobs, micro, self._group)
        return logprobs, _of_all_states(entropies, micro, self._group) if with_entropies else None


class CriticNetwork(nn.Module):
    """V(s_t) of response tokens: a linear head on a language model's last hidden states."""

    def __init__(self, backbone: nn.Module, value_head: nn.Linear, group: SequenceGroup | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = value_head
        self._group = group

    @classmethod
    def on(cls, causal_lm: Any, group: SequenceGroup | None = None) -> CriticNetwork:
        """On the weights of a policy, with a head that is zero."""
        head = nn.Linear(causal_lm.config.hidden_size, 1, dtype=causal_lm.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(causal_lm.base_model, head, group)

    @classmethod
    def load(cls, folder: str, model: ModelConfig, group: SequenceGroup | None = None) -> CriticNetwork:
        """What `export_critic` wrote, or any token classifier of transformers with one label."""
        found = _load(AutoModelForTokenClassification, folder, model, group, num_labels=1)
        return cls(found.base_model, found.score, group)

    def forward(self, micro: MicroBatch, with_final: bool = False) -> tuple[Tensor, Tensor | None]:
        """
        Returns:
            values (n,) and, at the last token of each response, the value (n,) of the state behind it, 0 elsewhere;
            float32, the second None unless asked for.
        """
        own = micro if self._group is None else self._group.stretch_of(micro)
        hidden = _hidden_states(self.backbone, own)
        index = torch.cat([own.state_index, own.final_index]) if with_final else own.state_index
        found = self.value_head(hidden[index]).squeeze(-1).float()
        values = _of_all_states(found[: own.state_index.numel()], micro, self._group)
        if not with_final:
            return values, None
        final = found[own.state_index.numel() :]
        if self._group is not None:
            final = self._group.gather(final, micro.final_index, micro.input_ids.numel())
        return values, torch.zeros_like(values).index_copy(0, micro.counts.cumsum(0) - 1, final)


def _of_all_states(own: Tensor, micro: MicroBatch, group: SequenceGroup | None) -> Tensor:
    """(n,) numbers of all states of the micro-batch, of which this rank may have computed a part."""
    return own if group is None else group.gather(own, micro.state_index, micro.input_ids.numel())


def _hidden_states(backbone: nn.Module, micro: MicroBatch) -> Tensor:
    """(L, hidden), each sequence by itself."""
    found = backbone(input_ids=micro.input_ids, position_ids=micro.position_ids, **micro.attention_arguments())
    states: Tensor = found.last_hidden_state
    return states[0]


def export_critic(network: CriticNetwork, weights: Iterable[tuple[str, Tensor]], base: str, folder: Path) -> None:
    """Writes the critic as a token classifier of transformers with one label; arguments are those of `export_causal_lm`."""
    config = AutoConfig.for_model(**{**network.backbone.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        classifier = AutoModelForTokenClassification.from_config(config)
    names = {"backbone": classifier.base_model_prefix, "value_head": "score"}
    state = {}
    for name, tensor in weights:
        part, _, rest = name.partition(".")
        state[f"{names[part]}.{rest}"] = tensor.detach().cpu().clone()
    classifier.save_pretrained(folder, state_dict=state)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


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
