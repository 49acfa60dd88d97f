"""Where prompts come from: a union of kinds of sources, chosen by ``name``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sae_rl.data.templates import REASONING_GYM_TEMPLATE, check_template
from sae_rl.settings import UNKNOWN_KEY, Fraction, NonNegative, Positive, Section, nearest, tag
from sae_rl.tasks.table import TASKS, knobs_of, make_task

Split = Literal["train", "held_out"]


class Source(Section):
    """What all kinds have."""

    weight: Annotated[float, Field(gt=0)] | None = (
        None  # of a part of a mixture: its share of a step's prompts; null: 1
    )

    @classmethod
    def hint(cls, key: str) -> str:
        owners = [name for name, kind in KINDS.items() if key in kind.model_fields]
        if owners:
            return f"which is a key of name: {', '.join(owners)}; allowed: {', '.join(sorted(cls.model_fields))}"
        return super().hint(key)


class ColumnsConfig(Section):
    """Our column -> the file's, with dots into nested objects; null: as the layout has it."""

    prompt: str | None = None
    answer: str | None = None
    id: str | None = None
    reward: str | None = None
    task: str | None = None


class ShapedSource(Source):
    """What becomes of the text of a prompt before a model reads it."""

    template: str | None = None  # text around {prompt}; of chat messages: around the last one
    system_prompt: str | None = None
    chat: bool = False  # text becomes a user's message and goes through the chat template

    @field_validator("template")
    @classmethod
    def _holds_the_prompt(cls, template: str | None) -> str | None:
        check_template(template)
        return template

    @model_validator(mode="after")
    def _system_prompts_need_chat(self) -> ShapedSource:
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt is a chat message: it needs chat: true")
        return self


class FileSource(ShapedSource):
    """JSONL, parquet, a folder of ``datasets.save_to_disk``, or a data set of the Hugging Face hub."""

    name: Literal["file"]
    path: str
    split: str | None = None  # of a Hugging Face data set that has several
    subset: str | None = None  # of one on the hub that has several, such as main of openai/gsm8k
    layout: Literal["own", "verl", "dapo_math", "gsm8k"] = "own"
    columns: ColumnsConfig = ColumnsConfig()
    reward: str  # of rows that name none: see sae_rl.rewards.table, or package.module:function
    duplicates: Literal["error", "drop"] = "error"  # rows whose id was there before
    num_prompts: Positive | None = None  # the first so many; null: all


class ProceduralSource(Source):
    """Problems of a task of `sae_rl.tasks.table`, written by a program."""

    name: str  # in TASKS
    split: Split = "train"
    seed: NonNegative = 0
    num_prompts: Positive
    reward: str | None = None  # null: the task's own
    knobs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("knobs")
    @classmethod
    def _are_of_the_task(cls, knobs: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        allowed = knobs_of(info.data["name"])
        if unknown := [knob for knob in knobs if knob not in allowed]:
            problem = "; ".join(f"has no {knob!r}, {nearest(knob, allowed)}" for knob in unknown)
            raise PydanticCustomError(UNKNOWN_KEY, "{problem}", {"problem": problem})
        make_task(info.data["name"], knobs)
        return knobs


class CurriculumConfig(Section):
    """Problems of one level at a time, and of the next when the policy has learnt to solve them."""

    levels: tuple[NonNegative, ...]  # of all attributes of reasoning-gym's curriculum; ascending
    promote_at: Fraction  # mean score
    window_prompts: Positive  # of the last so many prompts of the level

    @field_validator("levels")
    @classmethod
    def _ascend(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if not levels or list(levels) != sorted(set(levels)):
            raise ValueError(f"found {list(levels)}, but levels must ascend, and there must be one at least")
        return levels


class ReasoningGymSource(ShapedSource):
    """Problems of a task of reasoning-gym (arXiv 2505.24760)."""

    name: Literal["reasoning_gym"]
    task: str  # of reasoning-gym, such as chain_sum
    split: Split = "train"
    seed: NonNegative = 0
    num_prompts: Positive  # with a curriculum: of each level
    knobs: dict[str, Any] = Field(default_factory=dict)  # of the task's configuration in reasoning-gym
    levels: dict[str, NonNegative] | None = None  # by attribute of its curriculum; they decide those knobs
    curriculum: CurriculumConfig | None = None
    reward: str = "reasoning_gym"
    template: str | None = REASONING_GYM_TEMPLATE

    @model_validator(mode="after")
    def _one_way_to_choose_levels(self) -> ReasoningGymSource:
        if self.levels is not None and self.curriculum is not None:
            raise ValueError("levels and curriculum both choose levels: leave out one of them")
        return self


class MixtureSource(Source):
    """Prompts of several sources: in training by weight, in an evaluation all of them."""

    name: Literal["mixture"]
    parts: dict[str, PartSource]

    @field_validator("parts", mode="before")
    @classmethod
    def _parts_have_names(cls, parts: Any) -> Any:
        if isinstance(parts, Mapping) and not parts:
            raise ValueError("a mixture needs at least one part")
        for name, part in parts.items() if isinstance(parts, Mapping) else ():
            if "/" in str(name):
                raise ValueError(f"the name {name!r} of a part may not hold '/', which parts the ids of its prompts")
            if isinstance(part, Mapping) and part.get("name") == "mixture":
                raise ValueError(f"part {name!r} is a mixture itself: list its parts here, with weights of their own")
        return parts


KINDS: dict[str, type[Source]] = {
    "file": FileSource,
    "mixture": MixtureSource,
    "reasoning_gym": ReasoningGymSource,
    **dict.fromkeys(TASKS, ProceduralSource),
}
TAGS = {kind: tag(kind.__name__) for kind in KINDS.values()}


def _kind(node: Any) -> str:
    return TAGS[type(node)] if isinstance(node, Source) else TAGS[KINDS[node["name"]]]


def _with_a_known_name(node: Any) -> Any:
    if isinstance(node, Source):
        return node
    if not isinstance(node, Mapping):
        raise ValueError(f"found {node!r}, but it must be a mapping with a name")
    if "name" not in node:
        raise ValueError(f"name is missing, allowed: {', '.join(KINDS)}")
    if node["name"] not in KINDS:
        raise ValueError(f"name {node['name']!r} is unknown, allowed: {', '.join(KINDS)}")
    return node


PartSource = Annotated[
    Annotated[FileSource, Tag(TAGS[FileSource])]
    | Annotated[ProceduralSource, Tag(TAGS[ProceduralSource])]
    | Annotated[ReasoningGymSource, Tag(TAGS[ReasoningGymSource])],
    Discriminator(_kind),
    BeforeValidator(_with_a_known_name),
]
AnySource = Annotated[
    Annotated[FileSource, Tag(TAGS[FileSource])]
    | Annotated[ProceduralSource, Tag(TAGS[ProceduralSource])]
    | Annotated[ReasoningGymSource, Tag(TAGS[ReasoningGymSource])]
    | Annotated[MixtureSource, Tag(TAGS[MixtureSource])],
    Discriminator(_kind),
    BeforeValidator(_with_a_known_name),
]
MixtureSource.model_rebuild()


class TaskConfig(Section):
    train: AnySource | None  # null: of an evaluation
    evaluation: AnySource | None  # null: nothing is evaluated
    max_prompt_tokens: Positive
    overlong_prompts: Literal["error", "drop", "cut"]  # cut: keep the end


def problems_of_task(task: TaskConfig) -> list[str]:
    """What its sources ask for that does not fit where they stand; each line begins with the key."""
    problems = [
        f"{where}.weight = {source.weight:g}: only a part of a mixture has a weight; leave it out"
        for where, source in (("task.train", task.train), ("task.evaluation", task.evaluation))
        if source is not None and source.weight is not None
    ]
    evaluated: dict[str, Source | None] = {"task.evaluation": task.evaluation}
    if isinstance(task.evaluation, MixtureSource):
        evaluated |= {f"task.evaluation.parts.{name}": part for name, part in task.evaluation.parts.items()}
    problems += [
        f"{where}.curriculum: an evaluation does not learn; set it to null, and choose levels"
        for where, source in evaluated.items()
        if isinstance(source, ReasoningGymSource) and source.curriculum is not None
    ]
    return problems
