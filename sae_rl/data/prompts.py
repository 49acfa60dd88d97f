"""Turns a source, a procedural task, a file or a task of reasoning-gym, into prompts that a model can read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sae_rl.data.files import File, Record, read_records
from sae_rl.data.rows import listed
from sae_rl.data.templates import Shape
from sae_rl.reasoning_gym.puzzles import MAX_BARREN_DRAWS, PuzzleProcess, Puzzles
from sae_rl.settings import BadKeys
from sae_rl.tasks.task import Split, Task
from sae_rl.types import Prompt

logger = logging.getLogger(__name__)

Overlong = Literal["error", "drop", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """A source: the first ``num_prompts`` different problems of a procedural task."""

    task: Task
    num_prompts: int
    split: Split = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"problems need num_prompts >= 1, found {self.num_prompts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gym:
    """A source: problems of reasoning-gym, with the shape of their prompts."""

    puzzles: Puzzles
    reward: str = "reasoning_gym"
    shape: Shape = field(default_factory=Shape)


class NoChatTemplateError(ValueError):
    """A tokenizer cannot turn messages into text."""


def any_reward(name: str) -> None:
    """Lets every name pass: whoever resolves it says what is wrong."""


def load_prompts(
    source: Problems | File | Gym,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    overlong: Overlong = "error",
    *,
    process: PuzzleProcess | None = None,
    check_reward: Callable[[str], object] = any_reward,
) -> list[Prompt]:
    """Every prompt of a source, tokenized, in order.

    A prompt that is text is tokenized as it is; one that is a list of messages goes through the chat template.

    Args:
        overlong: what becomes of prompts of more than ``max_prompt_tokens``: an error, or they are left out, or cut to
            their end.
        process: draws problems of reasoning-gym; needed by a source of that kind.
        check_reward: raises ValueError if the reward that a row names does not exist.

    Raises:
        ValueError: everything that is wrong, a line for each: broken rows, prompts that are too long, or nothing left.
    """
    if overlong not in ("error", "drop", "cut"):
        raise ValueError(f"overlong: found {overlong!r}, allowed are 'error', 'drop' and 'cut'")
    problems: list[str] = []
    limit = source.num_prompts if isinstance(source, File) else None
    if isinstance(source, Problems):
        name, records = source.task.name, _problems(source)
    elif isinstance(source, Gym):
        assert process is not None, "a source of reasoning-gym is drawn in a process"
        name, records = source.puzzles.task, _puzzles(source, process)
    else:
        name = source.path
        # Of prompts that may be dropped nobody knows yet how many must be read.
        records, problems = read_records(source, check_reward, None if overlong == "drop" else limit)
    prompts, unread = _tokenized(records, tokenizer)
    fitting, too_long = _fitting(name, prompts, max_prompt_tokens, overlong, tokenizer)
    problems += listed(f"{name}: {len(unread)} of {len(records)} prompts cannot be read", unread) + too_long
    if problems:
        raise ValueError("\n".join(problems))
    if limit is not None and len(fitting) < limit:
        logger.warning("%s: num_prompts = %d, but it has %d", name, limit, len(fitting))
    return fitting[:limit]


def _problems(source: Problems) -> list[Record]:
    task, split, seed = source.task, source.split, source.seed
    found: dict[str, Record] = {}  # by prompt
    index = barren = 0
    while len(found) < source.num_prompts:
        problem = task.problem(seed, split, index)
        name = f"{task.name}/{split}/{seed}/{index}"
        record = Record(
            id=name, prompt=problem.prompt, answer=problem.answer, reward=task.reward, task=task.name, where=name
        )
        barren = 0 if found.setdefault(problem.prompt, record) is record else barren + 1
        if barren == MAX_BARREN_DRAWS:
            raise BadKeys(
                f"num_prompts = {source.num_prompts}: with these knobs {task.name} has {len(found)} different problems in "
                f"split {split}, or hardly more; lower num_prompts, or choose knobs that allow more"
            )
        index += 1
    return list(found.values())


def _puzzles(source: Gym, process: PuzzleProcess) -> list[Record]:
    puzzles = source.puzzles
    level = f"/level_{puzzles.levels}" if isinstance(puzzles.levels, int) else ""
    return [
        Record(
            id=(id_ := f"{puzzles.task}{level}/{puzzles.split}/{puzzles.seed}/{index}"),
            prompt=source.shape(problem.prompt),
            answer=problem.answer,
            reward=source.reward,
            task=puzzles.task,
            where=id_,
        )
        for index, problem in enumerate(process.draw(puzzles))
    ]


Located = tuple[str, Prompt]  # where in its file, and what it became


def _tokenized(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Located], list[str]]:
    """Prompts, and what is wrong with others."""
    prompts: list[Located] = []
    problems: list[str] = []
    for record in records:
        try:
            text, token_ids = prompt_token_ids(record.prompt, tokenizer)
        except NoChatTemplateError as error:
            return [], [f"{record.where}: {error}"]  # all others are the same
        except Exception as error:  # a template is a program that came with the model
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            problems.append(f"{record.where}: the tokenizer's chat template refuses the messages: {said}")
            continue
        prompt = Prompt(
            id=record.id,
            text=text,
            token_ids=tuple(token_ids),
            answer=record.answer,
            task=record.task,
            reward=record.reward,
        )
        prompts.append((record.where, prompt))
    return prompts, problems


def _fitting(
    name: str, located: Sequence[Located], limit: int, overlong: Overlong, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[str]]:
    """Prompts of at most ``limit`` tokens, and what is wrong if there are others."""
    prompts = [prompt for _, prompt in located]
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    if not (num_overlong := len(prompts) - len(fitting)):
        return prompts, []
    where, longest = max(located, key=lambda pair: len(pair[1].token_ids))
    found = (
        f"{name}: {num_overlong} of {len(prompts)} prompts exceed max_prompt_tokens = {limit}; the longest, "
        f"{longest.id!r}{f' in {where}' if where != longest.id else ''}, has {len(longest.token_ids)} tokens"
    )
    if overlong == "error":
        return [], [f"{found}. Raise max_prompt_tokens, or set overlong_prompts to 'drop' or 'cut'"]
    if overlong == "drop" and not fitting:
        return [], [f"{found}. Dropping them leaves nothing; raise max_prompt_tokens"]
    logger.warning("%s; %s", found, {"drop": "dropped", "cut": "cut to their end"}[overlong])
    return (fitting if overlong == "drop" else [_cut(prompt, limit, tokenizer) for prompt in prompts]), []


def _cut(prompt: Prompt, limit: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The end of the prompt; its text is what the model reads then."""
    if len(prompt.token_ids) <= limit:
        return prompt
    token_ids = prompt.token_ids[-limit:]
    text = tokenizer.decode(list(token_ids))
    assert isinstance(text, str)
    return replace(prompt, text=text, token_ids=token_ids)


def prompt_token_ids(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """What the model reads, as text and as tokens; chat messages end where the model's answer begins."""
    if isinstance(prompt, str):
        return prompt, tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise NoChatTemplateError(
            "a prompt is a list of chat messages, but the tokenizer has no chat template; use an instruction-tuned model, "
            "or give prompts as text (chat: false)"
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    # The template wrote the special tokens already.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]
