"""The workload of one iteration: a Qwen2 model of 789,120 parameters, prompts of random words, and a reward.

The model has 4 layers of width 128, 4 heads of 32, a SwiGLU of 256, and 1,024 tied token embeddings.

This module does not import ``sae_rl``, so that it also runs in the peers' environment.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

NUM_PROMPTS, GROUP_SIZE, RESPONSE_TOKENS = 64, 4, 128
NUM_RESPONSES = NUM_PROMPTS * GROUP_SIZE
NUM_TOKENS = NUM_RESPONSES * RESPONSE_TOKENS
PROMPT_WORDS = (8, 16)  # minimum and maximum; 15 to 31 tokens
MAX_PROMPT_TOKENS = 32
MICRO_BATCH_RESPONSES = 16  # faster than 64, for TRL too: fits the CPU's caches
LR = 1e-5

FIRST, SECOND = string.ascii_letters[:32], string.ascii_letters[:24]
PAIRS = [(a, b) for a in FIRST for b in SECOND]
VOCAB_SIZE = 256 + len(PAIRS)


def make(folder: Path, num_steps: int, seed: int = 0) -> None:
    """Writes ``folder/model``, a Hugging Face folder, and ``folder/prompts.jsonl`` with the prompts of ``num_steps``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = build_model(seed), build_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(seed)
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(num_steps * NUM_PROMPTS):
            words = ["".join(pair) for pair in rng.choices(PAIRS, k=rng.randint(*PROMPT_WORDS))]
            file.write(json.dumps({"id": str(i), "prompt": " ".join(words), "answer": "even"}) + "\n")


def build_tokenizer() -> Any:
    """Qwen2's byte-level BPE with 256 bytes and 768 pairs of letters.

    The end token's id is outside of the model's vocabulary, so no response ends before its limit.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in PAIRS)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    make_tokenizer: Any = Qwen2Tokenizer  # its annotations do not allow merges as pairs
    return make_tokenizer(
        vocab=vocabulary, merges=PAIRS, unk_token=None, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def shape() -> dict[str, Any]:
    """Arguments of the model's `Qwen2Config`."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def build_model(seed: int) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    make_model: Any = Qwen2ForCausalLM  # its constructor has no types
    return make_model(Qwen2Config(**shape()))


def parity(prompt: str, response: str, answer: str) -> float:
    """1 for a response with an even number of characters. About half are even, so advantages differ."""
    return float(len(response) % 2 == 0)
