"""Prompts from a procedural task of `sae_rl.tasks.table`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from sae_rl.data.loader import Loader
from sae_rl.data.prompts import Record
from sae_rl.data.sources.source import Source
from sae_rl.plugins import named
from sae_rl.settings import BadKeys, NonNegative, Positive
from sae_rl.tasks.table import make_task, task_class
from sae_rl.tasks.task import MAX_BARREN_DRAWS, Split
from sae_rl.types import Prompt


class ProceduralSource(Source):
    """The first ``num_prompts`` different problems of a task."""

    name: str  # in TASKS, or package.module:Class
    split: Split = "train"
    seed: NonNegative = 0
    num_prompts: Positive
    reward: str | None = None  # null: the task's own
    knobs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        task_class(name)
        return name

    @field_validator("knobs")
    @classmethod
    def _fit_the_task(cls, knobs: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "name" in info.data:
            make_task(info.data["name"], knobs)
        return knobs

    def prompts(self, loader: Loader) -> list[Prompt]:
        return loader.load(self.name, self.reward, self._records, self.num_prompts)

    def first_record(self) -> Record | None:
        try:
            return self.model_copy(update={"num_prompts": 1})._records()[0][0]
        except ValueError:
            return None  # the loader says what is wrong

    def _records(self) -> tuple[list[Record], list[str]]:
        task = make_task(self.name, self.knobs)
        reward = self.reward or task.name
        found: dict[str, Record] = {}  # by prompt
        index = barren = 0
        while len(found) < self.num_prompts:
            with named(task):
                problem = task.problem(self.seed, self.split, index)
            id_ = f"{task.name}/{self.split}/{self.seed}/{index}"
            record = Record(
                id=id_, prompt=problem.prompt, answer=problem.answer, reward=reward, task=task.name, where=id_
            )
            barren = 0 if found.setdefault(problem.prompt, record) is record else barren + 1
            if barren == MAX_BARREN_DRAWS:
                raise BadKeys(
                    f"num_prompts = {self.num_prompts}: with these knobs {task.name} has {len(found)} different problems in "
                    f"split {self.split}, or hardly more; lower num_prompts, or choose knobs that allow more"
                )
            index += 1
        return list(found.values()), []
