"""Turns a source, a procedural task or a file, into prompts that a model can read.

To add a task, write a class like `Level` or `Countdown` and put it in `TASKS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sae_rl.data.countdown import Countdown
from sae_rl.data.files import ColumnMap, Duplicates, Record, read_records
from sae_rl.data.level import Level
from sae_rl.data.task import Split, Task
from sae_rl.types import Prompt

logger = logging.getLogger(__name__)

TASKS: dict[str, Callable[..., Task]] = {"level": Level, "countdown": Countdown}

Overlong = Literal["error", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """A source: ``num_prompts`` problems of a procedural task, from number ``first`` on."""

    task: Task
    num_prompts: int
    split: Split = "train"
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.first < 0:
            raise ValueError(f"problems need num_prompts >= 1 and first >= 0, found {self.num_prompts}, {self.first}")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A source: one JSONL or parquet file. Rows that name no reward or task of their own get these."""

    path: str
    reward: str
    task: str
    columns: ColumnMap = field(default_factory=ColumnMap)
    duplicates: Duplicates = "error"


def load_prompts(
    source: Problems | File,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    overlong: Overlong = "error",
) -> list[Prompt]:
    """Every prompt of a source, tokenized, in order.

    A prompt that is text is tokenized as it is; one that is a list of messages goes through the chat template.

    Raises:
        ValueError: a broken file (all its broken lines are named), a prompt of more than ``max_prompt_tokens``
            (unless ``overlong`` is "drop"), or nothing left.
    """
    if overlong not in ("error", "drop"):
        raise ValueError(f"overlong: found {overlong!r}, allowed are 'error' and 'drop'")
    if isinstance(source, Problems):
        name, records = source.task.name, _problems(source)
    else:
        name = source.path
        records = read_records(source.path, source.columns, source.reward, source.task, source.duplicates)
    prompts = [_tokenized(record, tokenizer) for record in records]
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens]
    if num_overlong := len(prompts) - len(fitting):
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        found = (
            f"{name}: {num_overlong} of {len(prompts)} prompts exceed max_prompt_tokens = {max_prompt_tokens}; the "
            f"longest, {longest.id!r}, has {len(longest.token_ids)} tokens"
        )
        if overlong == "error":
            raise ValueError(f"{found}. Raise max_prompt_tokens, or set overlong to 'drop'")
        if not fitting:
            raise ValueError(f"{found}. Dropping them leaves nothing; raise max_prompt_tokens")
        logger.warning("%s; dropped", found)
    return fitting


def _problems(source: Problems) -> list[Record]:
    records = []
    for index in range(source.first, source.first + source.num_prompts):
        problem = source.task.problem(source.seed, source.split, index)
        id_ = f"{source.task.name}/{source.split}/{source.seed}/{index}"
        records.append(
            Record(
                id=id_, prompt=problem.prompt, answer=problem.answer, reward=source.task.reward, task=source.task.name
            )
        )
    return records


def _tokenized(record: Record, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    text, token_ids = prompt_token_ids(record.prompt, tokenizer)
    return Prompt(
        id=record.id,
        text=text,
        token_ids=tuple(token_ids),
        answer=record.answer,
        task=record.task,
        reward=record.reward,
    )


def prompt_token_ids(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """What the model reads, as text and as tokens; chat messages end where the model's answer begins."""
    if isinstance(prompt, str):
        return prompt, tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "a prompt is a list of chat messages, but the tokenizer has no chat template; use an instruction-tuned "
            "model, or give prompts as text"
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    # The template wrote the special tokens already.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]
