"""What one iteration is measured on: a 0.8 M-parameter Qwen2 model, prompts of random words, and a reward.

It imports nothing of ``sae_rl``, so that a peer's environment can read it too.

The section "End to end on CPU" of our notes on peers gives the size of the model and of the batch, not the shape. This is
our reading of it: 4 layers of width 128, 4 heads of 32, a SwiGLU of 256, and 1,024 tied word embeddings, which makes
788,608 parameters.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NUM_PROMPTS, GROUP_SIZE, RESPONSE_TOKENS = 64, 4, 128
NUM_RESPONSES = NUM_PROMPTS * GROUP_SIZE
NUM_TOKENS = NUM_RESPONSES * RESPONSE_TOKENS
PROMPT_TOKENS = (16, 32)  # shortest and longest
MICRO_BATCH_RESPONSES = 64
LR = 1e-5

WORDS = [f"w{i}" for i in range(1024)]
SPECIALS = ["<pad>", "<eos>", "<unk>"]


def make(folder: Path, num_steps: int, seed: int = 0) -> None:
    """Writes ``folder/model``, a Hugging Face folder, and ``folder/prompts.jsonl`` with the prompts of ``num_steps``."""
    tokenizer = build_tokenizer()
    model = build_model(seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(seed)
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(num_steps * NUM_PROMPTS):
            words = rng.choices(WORDS, k=rng.randint(*PROMPT_TOKENS))
            file.write(json.dumps({"id": str(i), "prompt": " ".join(words), "answer": "even"}) + "\n")


def build_tokenizer() -> Any:
    """One word, one token. The end token has an id that the model does not have, so no response ends before its limit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*WORDS, *SPECIALS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def shape() -> dict[str, Any]:
    """Of the Qwen2 model; there is no end token among its ids."""
    return {
        "vocab_size": len(WORDS),
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
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Qwen2Config(**shape()), dtype=torch.float32)


def parity(prompt: str, response: str, answer: str) -> float:
    """1 if the number of the last word is even: half of all responses, so that advantages differ."""
    return float(int(response.split()[-1].removeprefix("w")) % 2 == 0)
