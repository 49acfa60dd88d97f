"""Supervised training: makes a small base policy from the demonstrations of a procedural task.

It runs in one process with plain torch and transformers. The number of steps is fixed, not the time, so a seed gives the
same model on the same machine.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sae_rl.knobs import Knobs, choice, integer, number
from sae_rl.tasks.task import Task
from sae_rl.tasks.tokenizer import build_tokenizer

Example = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its response, end token included
Watch = Callable[[range], Iterable[int]]  # yields the same steps, and shows how far they are
IGNORED = -100  # label of a token that is not trained on
BUCKET_BATCHES = 16  # batches whose examples are sorted by length together
DEMONSTRATION_SEED = 1_000_000  # added to the seed, so that reinforcement learning draws other problems


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape(Knobs):
    """A decoder-only model small enough to train in minutes, by the names of transformers' configurations."""

    # Qwen3 normalizes queries and keys: on *Level* 99 % of its responses were valid, and 63 % of Qwen2's (one seed).
    # Qwen2 is not offered, since transformers 5 replaces a tokenizer beside a Qwen2 model by Qwen2's own.
    model_type: Literal["qwen3", "llama"] = choice("qwen3", allowed=("qwen3", "llama"))
    num_hidden_layers: int = integer(2, low=1)
    hidden_size: int = integer(64, low=1)
    intermediate_size: int = integer(128, low=1)
    num_attention_heads: int = integer(2, low=1)  # vLLM's attention on a CPU needs heads of at least 32
    initializer_range: float = number(0.08, low=0)  # with the usual 0.02 a model this narrow does not learn to copy
    tie_word_embeddings: bool = False
    max_position_embeddings: int = integer(1024, low=1)

    def check_together(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            allowed = f"a multiple of 2 * num_attention_heads = {2 * self.num_attention_heads}"
            raise ValueError(f"ModelShape.hidden_size = {self.hidden_size}, but it must be {allowed}")


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
    output_dir: Path, task: Task, settings: WarmStart, shape: ModelShape, watch: Watch = iter
) -> list[float]:
    """Trains a new model on demonstrations of a task and saves it as a Hugging Face folder.

    Args:
        output_dir: folder to write; it must not exist.

    Returns:
        The loss of each step.

    Raises:
        ValueError: the output folder exists.
    """
    if output_dir.exists():
        raise ValueError(f"output_dir: {output_dir} exists already; remove it or choose another folder")
    tokenizer = build_tokenizer(task.words())
    model = build_model(shape, tokenizer, settings.seed)
    losses = train(model, tokenizer, partial(demonstration, task, tokenizer, settings.seed), settings, watch)
    save(model, tokenizer, output_dir)
    return losses


def demonstration(task: Task, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
    """Demonstration ``index`` of a task."""
    problem = task.problem(DEMONSTRATION_SEED + seed, "train", index)
    response = task.demonstration(problem, random.Random(f"{seed}/{index}"))
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return tokenizer(problem.prompt)["input_ids"], [*response_ids, tokenizer.eos_token_id]


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Makes a model of ``shape`` with random weights and the tokenizer's vocabulary."""
    config = AutoConfig.for_model(
        **asdict(shape),
        vocab_size=len(tokenizer),
        num_key_value_heads=shape.num_attention_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        **_special_tokens(tokenizer),
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def batches(example: Callable[[int], Example], settings: WarmStart) -> Iterator[list[Example]]:
    """Yields shuffled batches of examples of similar length, without end.

    Args:
        example: makes the example of an index. An epoch has as many as all steps together take.
    """
    rng = random.Random(settings.seed)
    pending: list[Example] = []
    while True:
        order = list(range(settings.steps * settings.batch_size))
        rng.shuffle(order)
        for i in order:
            pending.append(example(i))
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
    example: Callable[[int], Example],
    settings: WarmStart,
    watch: Watch = iter,
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
    stream = batches(example, settings)
    for step in watch(range(settings.steps)):
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
