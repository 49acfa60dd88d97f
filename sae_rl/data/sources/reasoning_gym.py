"""Prompts from a task of reasoning-gym (arXiv 2505.24760), of fixed difficulty or with a curriculum."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sae_rl.data.curriculum import CurriculumSampler
from sae_rl.data.loader import Loader
from sae_rl.data.prompts import Record
from sae_rl.data.sampler import PromptSampler
from sae_rl.data.sources.source import ShapedSource
from sae_rl.reasoning_gym.puzzles import Puzzles
from sae_rl.settings import Fraction, NonNegative, Positive, Section
from sae_rl.tasks.task import Split
from sae_rl.types import Prompt

TEMPLATE = (
    "{prompt}\n\nThink step by step. Then write the final answer, and nothing else, between <answer> and </answer>.\n"
)


class CurriculumConfig(Section):
    """Prompts of one level at a time. The sampler moves to the next level when the policy solves enough of this one."""

    levels: tuple[NonNegative, ...]  # ascending; each holds for all attributes of the task's curriculum
    promote_at: Fraction  # mean score that ends a level
    window_prompts: Positive  # the mean is over the last so many prompts of the level

    @field_validator("levels")
    @classmethod
    def _ascend(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if not levels or list(levels) != sorted(set(levels)):
            raise ValueError(f"found {list(levels)}, but levels must ascend, and there must be one at least")
        return levels


class ReasoningGymSource(ShapedSource):
    name: Literal["reasoning_gym"]
    task: str  # a name of reasoning-gym, such as chain_sum
    split: Split = "train"
    seed: NonNegative = 0
    num_prompts: Positive  # with a curriculum: of each level
    knobs: dict[str, Any] = Field(default_factory=dict)  # fields of the task's configuration in reasoning-gym
    levels: dict[str, NonNegative] | None = None  # attribute of the task's curriculum -> level; it sets their knobs
    curriculum: CurriculumConfig | None = None
    reward: str = "reasoning_gym"
    template: str | None = TEMPLATE

    @model_validator(mode="after")
    def _one_way_to_choose_levels(self) -> ReasoningGymSource:
        if self.levels is not None and self.curriculum is not None:
            raise ValueError("levels and curriculum both choose levels: leave out one of them")
        return self

    def prompts(self, loader: Loader) -> list[Prompt]:
        return self._at(self.levels, loader)

    def sampler(self, loader: Loader, seed: int) -> PromptSampler | None:
        if self.curriculum is None:
            return super().sampler(loader, seed)
        levels = {level: self._at(level, loader) for level in self.curriculum.levels}
        if not all(levels.values()) or not loader.is_enough(min(map(len, levels.values()))):
            return None
        promote_at, window = self.curriculum.promote_at, self.curriculum.window_prompts
        return CurriculumSampler(levels, seed, promote_at=promote_at, window_prompts=window)

    def _at(self, levels: dict[str, int] | int | None, loader: Loader) -> list[Prompt]:
        return loader.load(self.task, self.reward, lambda: (self._records(levels, loader), []), self.num_prompts)

    def _records(self, levels: dict[str, int] | int | None, loader: Loader) -> list[Record]:
        task, num_prompts, split, seed = self.task, self.num_prompts, self.split, self.seed
        puzzles = Puzzles(task=task, num_prompts=num_prompts, knobs=self.knobs, levels=levels, split=split, seed=seed)
        level = f"/level_{levels}" if isinstance(levels, int) else ""
        records = []
        for index, problem in enumerate(loader.puzzles.draw(puzzles)):
            id_, prompt = f"{task}{level}/{split}/{seed}/{index}", self.shaped(problem.prompt)
            records.append(
                Record(id=id_, prompt=prompt, answer=problem.answer, reward=self.reward, task=task, where=id_)
            )
        return records
