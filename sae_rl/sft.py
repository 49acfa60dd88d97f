"""Supervised training: makes a small base policy from nothing, or fine-tunes any local Hugging Face model.

One process, plain torch and transformers. The number of steps, not a clock, decides when it ends, so that a seed
gives the same model on the same machine.
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
from torch.nn import functional as F
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
from sae_rl.tasks.task import Task
from sae_rl.tasks.tokenizer import build_tokenizer

Example = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its response, end token included
OnProgress = Callable[[int, float], None]  # (steps done, loss of the last one)
IGNORED = -100  # a label that is not trained on
BUCKET_BATCHES = 16  # batches whose examples are sorted by length together
DEMONSTRATION_SEED = 1_000_000  # keeps demonstrated problems apart from those that reinforcement learning draws


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only model small enough to train in minutes."""

    # Qwen3 normalizes queries and keys: on *Level* 99 % of its responses were valid where Qwen2 had 63 % (one seed).
    # Not qwen2: transformers 5 reads the tokenizer beside such a model as Qwen2's, whatever the folder says.
    architecture: Literal["qwen3", "llama"] = "qwen3"
    num_layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 128
    num_heads: int = 2  # vLLM's CPU attention wants hidden_size / num_heads of at least 32
    initializer_range: float = 0.08  # the usual 0.02 is far too small at this width: the model does not learn to copy
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 1024

    def __post_init__(self) -> None:
        if self.architecture not in ("qwen3", "llama"):
            raise ValueError(f"shape.architecture: found {self.architecture!r}, allowed: 'qwen3', 'llama'")
        for knob in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "max_position_embeddings"):
            if getattr(self, knob) < 1:
                raise ValueError(f"shape.{knob}: found {getattr(self, knob)}, allowed: at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"shape.hidden_size: found {self.hidden_size}, allowed: multiples of 2 * num_heads = {2 * self.num_heads}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """Settings of supervised training; the defaults make a base policy for *Level* in 90 s of one core."""

    steps: int = 2400
    batch_size: int = 4
    lr: float = 6e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for knob, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("weight_decay", 0), ("threads", 1)):
            if getattr(self, knob) < least:
                raise ValueError(f"warm_start.{knob}: found {getattr(self, knob)}, allowed: at least {least}")
        for knob in ("lr", "max_grad_norm"):
            if getattr(self, knob) <= 0:
                raise ValueError(f"warm_start.{knob}: found {getattr(self, knob)}, allowed: above 0")


def warm_start(
    output_dir: str,
    source: Task | str,
    base_model: str | None,
    settings: WarmStart,
    shape: ModelShape | None = None,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Makes a model, or loads ``base_model``, trains it, and saves it as a Hugging Face folder.

    Args:
        source: a task, whose demonstrations are made as they are needed, or the path of a JSONL or parquet file with
            the columns ``prompt`` and ``response``.
        base_model: a local folder; None: a new model of ``shape``, with the tokenizer of the task.

    Returns:
        The loss of every step.

    Raises:
        ValueError: the output folder exists, or the source is broken or does not fit the model.
    """
    target = Path(output_dir)
    if target.exists():
        raise ValueError(f"output_dir: {output_dir} exists already; remove it or choose another folder")
    if base_model is not None:
        if not Path(base_model).is_dir():
            raise ValueError(f"base_model: {base_model} is not a local folder")
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        dtype = AutoConfig.from_pretrained(base_model).dtype or torch.float32
    else:
        if isinstance(source, str):
            raise ValueError("base_model is missing: a file of demonstrations brings no tokenizer with it")
        tokenizer = build_tokenizer(source.words())
        model = build_model(shape or ModelShape(), tokenizer, settings.seed)
        dtype = torch.float32
    examples: Sequence[Example]
    if isinstance(source, str):
        examples = read_examples(source, tokenizer)
        check_lengths(examples, model)
    else:
        examples = Demonstrations(source, tokenizer, settings.steps * settings.batch_size, settings.seed)
    losses = train(model, tokenizer, examples, settings, on_progress)
    torch.nn.Module.to(model, dtype=dtype)
    save(model, tokenizer, target)
    return losses


class Demonstrations(Sequence[Example]):
    """Demonstrations of a task, each made when it is asked for."""

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
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return prompt_token_ids(prompt, tokenizer)[1], [*response_ids, tokenizer.eos_token_id]


def read_examples(path: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The rows of a file with the columns ``prompt`` (text or chat messages) and ``response``."""
    rows, problems = parse_rows(path, lambda row, _: (prompt_at(row, "prompt"), text_at(row, "response")))
    if problems:
        raise ValueError("\n".join(problems))
    return [example_of(prompt, response, tokenizer) for prompt, response in rows]


def check_lengths(examples: Sequence[Example], model: PreTrainedModel) -> None:
    most = model.config.max_position_embeddings
    lengths = [len(prompt) + len(response) for prompt, response in examples]
    if num_longer := sum(length > most for length in lengths):
        raise ValueError(
            f"{num_longer} of {len(lengths)} examples exceed the model's context of {most} tokens; the longest has "
            f"{max(lengths)}. Shorten or remove them"
        )


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A model with random weights, as large as ``shape`` says and with the tokenizer's vocabulary."""
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
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batches(examples: Sequence[Example], settings: WarmStart) -> Iterator[list[Example]]:
    """Endless shuffled batches of examples of similar length."""
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
    """(B, L) token ids, padded at the right, and (B, L) labels, IGNORED wherever there is no response."""
    width = max(len(prompt) + len(response) for prompt, response in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    for row, (prompt, response) in enumerate(batch):
        start, end = len(prompt), len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        labels[row, start:end] = ids[row, start:end]
    return ids, labels


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: WarmStart,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Minimizes -log pi(response | prompt) per response token; returns the loss of every step."""
    if not examples:
        raise ValueError("supervised training needs at least one example, found none")
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)  # dropout, where a model has it
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
    )

    def lr_factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        return rise * min(1.0, (settings.steps - step) / max(1, settings.steps - settings.warmup_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    losses: list[float] = []
    model.train()
    stream = batches(examples, settings)
    for step in range(settings.steps):
        ids, labels = padded(next(stream), tokenizer.eos_token_id)
        # Causal attention never looks at the padding at the right, so no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if on_progress:
            on_progress(step + 1, losses[-1])
    model.eval()
    torch.set_num_threads(num_threads_before)
    return losses


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Writes next to ``target`` and renames, so that a folder of that name is always complete."""
    if model.generation_config is None or model.generation_config.eos_token_id is None:
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
