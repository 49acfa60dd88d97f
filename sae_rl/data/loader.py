"""Loads the prompts of sources, and collects everything that is wrong with them into one message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from sae_rl.data.prompts import Overlong, Record, tokenized
from sae_rl.reasoning_gym.puzzles import PuzzleProcess
from sae_rl.settings import BadKeys, ConfigError
from sae_rl.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """What sources need to load prompts, and the problems that they found.

    It is a context manager. At the end of its block it raises a ConfigError with all problems.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    overlong: Overlong  # what happens to longer prompts
    check_reward: Callable[[str], object]  # raises ValueError if a verifier of this name does not exist
    prompts_at_once: Mapping[str, int] = field(default_factory=dict)  # key -> prompts that a run takes at once
    key: str = "task"  # where the source is in the configuration
    part: str | None = None  # the name of the source in a mixture
    share: float = 1.0  # the source's share of the prompts that a run takes
    problems: list[str] = field(default_factory=list)
    puzzles: PuzzleProcess = field(default_factory=PuzzleProcess)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.puzzles.close()
        if kind is None and self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))  # levels of a curriculum may have the same problem

    def at(self, key: str) -> Loader:
        """A loader for the source at ``key``, which collects problems in the same list."""
        return replace(self, key=key)

    def of_part(self, name: str, share: float = 1.0) -> Loader:
        """A loader for a part of the mixture at this key."""
        return replace(self, key=f"{self.key}.parts.{name}", part=name, share=share)

    def load(
        self, name: str, reward: str | None, read: Callable[[], tuple[list[Record], list[str]]], num_prompts: int | None
    ) -> list[Prompt]:
        """The prompts of one source; none if something is wrong.

        Args:
            name: what messages call the source.
            reward: the source's reward, which is checked here; None: the records' own rewards need no check.
            read: returns the records, and a line for each problem. It may raise ValueError, or BadKeys for wrong keys.
            num_prompts: the most prompts to return; None: all.
        """
        if reward is not None:
            try:
                self.check_reward(reward)
            except ValueError as error:
                self.problems.append(f"{self.key}.reward: {error}")
        try:
            records, problems = read()
        except ValueError as error:
            between = "." if isinstance(error, BadKeys) else ": "
            self.problems.extend(f"{self.key}{between}{line}" for line in str(error).splitlines())
            return []
        prompts, more = tokenized(name, records, self.tokenizer, self.max_prompt_tokens, self.overlong)
        if problems := problems + more:
            self.problems.extend(f"{self.key}: {line}" for line in problems)
            return []
        if num_prompts is not None and len(prompts) < num_prompts:
            logger.warning("%s: num_prompts = %d, but it has %d", name, num_prompts, len(prompts))
        prompts = prompts[:num_prompts]
        if self.part is None:
            return prompts
        return [replace(prompt, id=f"{self.part}/{prompt.id}", task=self.part) for prompt in prompts]

    def is_enough(self, num_prompts: int) -> bool:
        """Whether the source has as many prompts as a run takes from it at once. If not, that is a problem."""
        too_many = {key: count for key, count in self.prompts_at_once.items() if int(count * self.share) > num_prompts}
        share = f" for its share of {self.share:.0%}" if self.share < 1 else ""
        self.problems.extend(
            f"{key} = {count}, but {self.key} has {num_prompts} prompts{share}" for key, count in too_many.items()
        )
        return not too_many
