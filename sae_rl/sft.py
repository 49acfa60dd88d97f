"""Supervised training: makes a small base policy from scratch, or fine-tunes any local Hugging Face model.

It runs in one process with plain torch and transformers. The number of steps is fixed, not the time, so a seed gives the
same model on the same machine.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sae_rl.data.columns import prompt_at, text_at
from sae_rl.data.prompts import prompt_token_ids
from sae_rl.data.rows import parse_rows
from sae_rl.knobs import Knobs, choice, integer, number
from sae_rl.tasks.task import Task
from sae_rl.tasks.tokenizer import build_tokenizer

Example = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its response, end token included
OnProgress = Callable[[int, float], None]  # (steps done, loss of the last one)
IGNORED = -100  # label of a token that is not trained on
BUCKET_BATCHES = 16  # batches whose examples are sorted by length together
DEMONSTRATION_SEED = 1_000_000  # added to the seed, so that reinforcement learning draws other problems


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape(Knobs):
    """A decoder-only model small enough to train in minutes."""

    # Qwen3 normalizes queries and keys: on *Level* 99 % of its responses were valid, and 63 % of Qwen2's (one seed).
    # Qwen2 is not offered, since transformers 5 replaces a tokenizer beside a Qwen2 model by Qwen2's own.
    architecture: Literal["qwen3", "llama"] = choice("qwen3", allowed=("qwen3", "llama"))
    num_layers: int = integer(2, low=1)
    hidden_size: int = integer(64, low=1)
    intermediate_size: int = integer(128, low=1)
    num_heads: int = integer(2, low=1)  # vLLM's attention on a CPU needs a hidden_size / num_heads of at least 32
    initializer_range: float = number(0.08, low=0)  # with the usual 0.02 a model this narrow does not learn to copy
    tie_word_embeddings: bool = False
    max_position_embeddings: int = integer(1024, low=1)

    def check_together(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"ModelShape.hidden_size = {self.hidden_size}, but it must be a multiple of 2 * num_heads = "
                f"{2 * self.num_heads}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart(Knobs):
    """Settings of supervised training; the defaults make a base policy for *Level* in 90 s on one core."""

    steps: int = integer(2400, low=1)
    batch_size: int = integer(4, low=1)
    lr: float = number(6e-3, low=0, above_low=True)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = number(0.0, low=0)
    warmup_steps: int = integer(50, low=0)
    max_grad_norm: float = number(1.0, low=0, above_low=True)
    seed: int = 0
    threads: int = integer(1, low=1)


def warm_start(
    output_dir: str,
    source: Task | str,
    base_model: str | None,
    settings: WarmStart,
    shape: ModelShape | None = None,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Trains a model on demonstrations and saves it as a Hugging Face folder.

    Args:
        output_dir: folder to write; it must not exist.
        source: a task, or the path of a JSONL or parquet file with the columns ``prompt`` and ``response``.
        base_model: local folder of the model to fine-tune; None makes a new model with the task's tokenizer.
        shape: shape of a new model.

    Returns:
        The loss of each step.

    Raises:
        ValueError: the output folder exists, or the source is broken or does not fit the model.
    """
    target = Path(output_dir)
    if target.exists():
        raise ValueError(f"output_dir: {output_dir} exists already; remove it or choose another folder")
    dtype = torch.float32
    if base_model is not None:
        if not Path(base_model).is_dir():
            raise ValueError(f"base_model: {base_model} is not a local folder")
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        dtype = AutoConfig.from_pretrained(base_model).dtype or dtype
    elif isinstance(source, str):
        raise ValueError("base_model is missing: a file of demonstrations does not determine a tokenizer")
    else:
        tokenizer = build_tokenizer(source.words())
        model = build_model(shape or ModelShape(), tokenizer, settings.seed)
    examples: Sequence[Example]
    if isinstance(source, str):
        examples = read_examples(source, tokenizer, model.config.max_position_embeddings)
    else:
        examples = Demonstrations(source, tokenizer, settings.steps * settings.batch_size, settings.seed)
    losses = train(model, tokenizer, examples, settings, on_progress)
    save(model.to(dtype), tokenizer, target)  # type: ignore[arg-type]
    return losses


class Demonstrations(Sequence[Example]):
    """Demonstrations of a task; each is made on access."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, num_examples: int, seed: int) -> None:
        self._task, self._tokenizer, self._num_examples, self._seed = task, tokenizer, num_examples, seed

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._num_examples:
            raise IndexError(index)
        problem = self._task.problem(DEMONSTRATION_SEED + self._seed, "train", index)
        response = self._task.demonstration(problem, random.Random(f"{self._seed}/{index}"))
        return example_of(problem.prompt, response, self._tokenizer)


def example_of(prompt: str | list[dict[str, Any]], response: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenizes a prompt, text or chat messages, and its response."""
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return prompt_token_ids(prompt, tokenizer)[1], [*response_ids, tokenizer.eos_token_id]


def read_examples(path: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """Reads a file with the columns ``prompt`` (text or chat messages) and ``response``.

    Raises:
        ValueError: rows are broken, and the message lists them; or examples are longer than ``max_tokens``.
    """
    rows, problems = parse_rows(path, lambda row, _: (prompt_at(row, "prompt"), text_at(row, "response")))
    if problems:
        raise ValueError("\n".join(problems))
    examples = [example_of(prompt, response, tokenizer) for prompt, response in rows]
    lengths = [len(prompt) + len(response) for prompt, response in examples]
    if num_longer := sum(length > max_tokens for length in lengths):
        raise ValueError(
            f"{num_longer} of {len(lengths)} examples exceed the model's context of {max_tokens} tokens; the longest has "
            f"{max(lengths)}. Shorten or remove them"
        )
    return examples


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Makes a model of ``shape`` with random weights and the tokenizer's vocabulary."""
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=shape.tie_word_embeddings,
        max_position_embeddings=shape.max_position_embeddings,
        **_special_tokens(tokenizer),
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def batches(examples: Sequence[Example], settings: WarmStart) -> Iterator[list[Example]]:
    """Yields shuffled batches of examples of similar length, without end."""
    rng = random.Random(settings.seed)
    pending: list[Example] = []
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        for i in order:
            pending.append(examples[i])
            if len(pending) == BUCKET_BATCHES * settings.batch_size:
                pending.sort(key=lambda e: len(e[0]) + len(e[1]))
                starts = list(range(0, len(pending), settings.batch_size))
                rng.shuffle(starts)
                yield from (pending[s : s + settings.batch_size] for s in starts)
                pending = []


def padded(batch: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded on the right, and labels (B, L), `IGNORED` outside of responses."""
    ids = [torch.tensor([*prompt, *response]) for prompt, response in batch]
    labels = [torch.tensor([*([IGNORED] * len(prompt)), *response]) for prompt, response in batch]
    return pad_sequence(ids, True, pad), pad_sequence(labels, True, IGNORED)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: WarmStart,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Minimizes -log pi(response | prompt) per response token, in place; returns the loss of each step."""
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)  # for models with dropout
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
    )

    losses: list[float] = []
    model.train()
    stream = batches(examples, settings)
    for step in range(settings.steps):
        ids, labels = padded(next(stream), tokenizer.eos_token_id)
        warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        decay = min(1.0, (settings.steps - step) / max(1, settings.steps - settings.warmup_steps))
        optimizer.param_groups[0]["lr"] = settings.lr * (warmup * decay)
        # No mask: under causal attention no token sees the padding to its right.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if on_progress:
            on_progress(step + 1, losses[-1])
    torch.set_num_threads(num_threads_before)
    return losses


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Writes to a temporary folder and renames it, so that a folder named ``target`` is always complete."""
    if model.generation_config is None or model.generation_config.eos_token_id is None:
        model.generation_config = GenerationConfig(**_special_tokens(tokenizer))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
