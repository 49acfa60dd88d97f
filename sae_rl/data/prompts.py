"""From the problems of a source to prompts: token ids, and a limit on their number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from sae_rl.data.columns import Messages
from sae_rl.data.rows import listed
from sae_rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes a second, and every command loads this module

logger = logging.getLogger(__name__)

Overlong = Literal["error", "drop", "cut"]  # a prompt above the limit is an error, is dropped, or keeps its end only
Located = tuple[str, Prompt]  # (place in the source, prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One problem of a source, checked but not tokenized."""

    id: str
    prompt: str | Messages
    answer: str
    reward: str
    task: str
    where: str  # its place in the source, such as "line 3"
    is_json: bool = False  # the answer was a list, an object, true or false, and is JSON now


def tokenized(
    name: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_tokens: int, overlong: Overlong
) -> tuple[list[Prompt], list[str]]:
    """The prompts of the source ``name``, in order, and lines about everything that is wrong with them."""
    messages = next((record for record in records if not isinstance(record.prompt, str)), None)
    if messages is not None and tokenizer.chat_template is None:
        return [], [
            f"{name}: {messages.where} is a list of chat messages, but the tokenizer has no chat template; use an "
            "instruction-tuned model, or give prompts as text (chat: false)"
        ]
    prompts: list[Located] = []
    unreadable: list[str] = []
    for record in records:
        try:
            text, token_ids = _text_and_token_ids(record.prompt, tokenizer)
        except Exception as error:  # a chat template is a program that came with the model
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            unreadable.append(f"{record.where}: the tokenizer's chat template refuses the messages: {said}")
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
    fitting, too_long = _within(name, prompts, max_tokens, overlong, tokenizer)
    return fitting, listed(f"{name}: {len(unreadable)} of {len(records)} prompts cannot be read", unreadable) + too_long


def _within(
    name: str, located: Sequence[Located], max_tokens: int, overlong: Overlong, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[str]]:
    """Prompts of at most ``max_tokens`` tokens, and a line if the others are an error."""
    prompts = [prompt for _, prompt in located]
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if not (num_overlong := len(prompts) - len(fitting)):
        return prompts, []
    where, longest = max(located, key=lambda pair: len(pair[1].token_ids))
    found = (
        f"{name}: {num_overlong} of {len(prompts)} prompts exceed max_prompt_tokens = {max_tokens}; the longest, "
        f"{longest.id!r}{f' in {where}' if where != longest.id else ''}, has {len(longest.token_ids)} tokens"
    )
    if overlong == "error":
        return [], [f"{found}. Raise max_prompt_tokens, or set overlong_prompts to 'drop' or 'cut'"]
    if overlong == "drop" and not fitting:
        return [], [f"{found}. Dropping them leaves nothing; raise max_prompt_tokens"]
    logger.warning("%s; %s", found, {"drop": "dropped", "cut": "cut to their end"}[overlong])
    return (fitting if overlong == "drop" else [_cut(prompt, max_tokens, tokenizer) for prompt in prompts]), []


def _cut(prompt: Prompt, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The last ``max_tokens`` tokens of a prompt, with the text that they stand for."""
    if len(prompt.token_ids) <= max_tokens:
        return prompt
    token_ids = prompt.token_ids[-max_tokens:]
    text = tokenizer.decode(list(token_ids))
    assert isinstance(text, str)
    return replace(prompt, text=text, token_ids=token_ids)


def _text_and_token_ids(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The text that the model reads, and its token ids. Chat messages end where the model's answer begins."""
    if isinstance(prompt, str):
        return prompt, tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    # The template writes the special tokens itself.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]
