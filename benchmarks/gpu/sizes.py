"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

VOCABULARY = 151_936
# Layer sizes of Qwen3 models.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-4B": {
        **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "tie_word_embeddings": True},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    },
    "Qwen3-8B": {
        **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "tie_word_embeddings": False},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens, layers and rounds of all parts."""

    rounds: int
    recursion: tuple[str, ...]  # responses x longest response
    row_tokens: int  # of a packed row
    heads: tuple[int, int, int]  # of attention: queries, keys, numbers in each
    logprob_tokens: tuple[int, ...]
    vocabulary: int
    hidden: int  # numbers in the states that logprobs are computed from
    models: dict[str, dict[str, Any]]
    most_layers: int  # of a model; memory may allow fewer
    micro_batches: int  # of an update
    response_tokens: int  # of the longest response
    compared_layers: int  # of the model whose precisions are compared


FULL = Sizes(
    rounds=5,
    recursion=("512x1024", "512x8192", "8x131072"),
    row_tokens=18_432,
    heads=(32, 8, 128),
    logprob_tokens=(8192, 32_768),
    vocabulary=VOCABULARY,
    hidden=4096,
    models=MODELS,
    most_layers=99,
    micro_batches=4,
    response_tokens=8192,
    compared_layers=12,
)
QUICK = replace(
    FULL,
    rounds=2,
    recursion=("512x1024", "512x8192"),
    logprob_tokens=(8192,),
    models={"Qwen3-4B": MODELS["Qwen3-4B"]},
    most_layers=8,
    micro_batches=2,
    compared_layers=4,
)
# For a CPU: every line of the benchmark runs, and the figures mean nothing.
TINY = Sizes(
    rounds=1,
    recursion=("3x16",),
    row_tokens=96,
    heads=(4, 2, 8),
    logprob_tokens=(40,),
    vocabulary=64,
    hidden=16,
    models={
        "tiny": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "tie_word_embeddings": True},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        }
    },
    most_layers=2,
    micro_batches=2,
    response_tokens=48,
    compared_layers=2,
)
