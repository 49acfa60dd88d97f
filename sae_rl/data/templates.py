"""What becomes of the text of a prompt before a model reads it: a template around it, a chat, a system prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_rl.data.rows import BrokenRow

PROMPT = "{prompt}"
REASONING_GYM_TEMPLATE = (
    "{prompt}\n\nThink step by step. Then write the final answer, and nothing else, between <answer> and </answer>.\n"
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """See `sae_rl.data.sources.ShapedSource`."""

    template: str | None = None
    system_prompt: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        check_template(self.template)

    def __call__(self, prompt: str | Messages) -> str | Messages:
        """Raises BrokenRow if messages have a system prompt already, or end with another role than a user's."""
        if isinstance(prompt, str):
            text = self._filled(prompt)
            if not self.chat:
                return text
            return [*self._system(), {"role": "user", "content": text}]
        messages = list(prompt)
        if self.template is not None:
            if messages[-1]["role"] != "user":
                raise BrokenRow(
                    f"the template goes around a user's message, but the last is from {messages[-1]['role']!r}"
                )
            messages[-1] = {**messages[-1], "content": self._filled(messages[-1]["content"])}
        if self.system_prompt is not None and any(message["role"] == "system" for message in messages):
            raise BrokenRow("the messages hold a system prompt already; set system_prompt to null")
        return [*self._system(), *messages]

    def _filled(self, text: str) -> str:
        # Not str.format: other braces, as of \boxed{}, are text.
        return text if self.template is None else self.template.replace(PROMPT, text)

    def _system(self) -> Messages:
        return [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]


def check_template(template: str | None) -> None:
    """Raises ValueError unless it has one place for the prompt."""
    if template is not None and template.count(PROMPT) != 1:
        raise ValueError(f"found {template!r}, but a template has {PROMPT} once, where the prompt goes")
