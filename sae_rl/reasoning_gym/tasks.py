"""The tasks of reasoning-gym (arXiv 2505.24760) by name, with checks of their knobs and levels.

reasoning-gym is imported inside functions, because its import takes seconds and few runs need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_rl.names import nearest
from sae_rl.settings import BadKeys, from_knobs

OWN_KEYS = ("seed", "size")  # fields of every task's configuration that the source sets


def make_dataset(task: str, knobs: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A data set of reasoning-gym: ``dataset[i]`` is an entry, ``dataset.score_answer(answer, entry)`` scores.

    Raises:
        BadKeys: there is no such task, or it refuses these knobs.
    """
    dataset_class, config_class = _classes(task)
    if own := [knob for knob in knobs if knob in OWN_KEYS]:
        raise BadKeys(f"knobs.{own[0]}: it is a key of the source, beside knobs")
    try:
        # pydantic reads dates, tuples and enumerations from YAML values and checks types; reasoning-gym checks ranges.
        return dataset_class(config=from_knobs(config_class, task, {**knobs, "seed": seed, "size": size}))
    except (AssertionError, ValueError, TypeError) as error:
        raise BadKeys(f"knobs = {dict(knobs)}: {task} refuses them: {error}") from error


def knobs_at(task: str, knobs: Mapping[str, Any], levels: Mapping[str, int] | int | None) -> dict[str, Any]:
    """``knobs``, and the knobs that levels of difficulty stand for.

    Args:
        levels: attribute of the task's curriculum -> level; or one level for all attributes, each up to its highest.

    Raises:
        BadKeys: there is no such task, curriculum, attribute or level, or a knob is given twice.
    """
    if levels is None:
        return dict(knobs)
    from reasoning_gym.factory import CURRICULA

    _classes(task)  # raises if there is no such task
    if task not in CURRICULA:
        raise BadKeys(f"levels, curriculum: reasoning-gym has no curriculum for {task}; set its knobs instead")
    curriculum = CURRICULA[task]()
    attributes = curriculum.attributes
    if isinstance(levels, int):
        highest = max(len(attribute.levels) for attribute in attributes.values()) - 1
        if not 0 <= levels <= highest:
            raise BadKeys(f"curriculum.levels: found {levels}, but the levels of {task} are 0 to {highest}")
        wanted = {name: min(levels, len(attribute.levels) - 1) for name, attribute in attributes.items()}
    else:
        wanted = dict(levels)
        problems = [
            f"levels has no {name!r}, {nearest(name, list(attributes))}" for name in wanted if name not in attributes
        ]
        problems += [
            f"levels.{name}: found {level}, allowed: 0 to {len(attributes[name].levels) - 1}"
            for name, level in wanted.items()
            if name in attributes and not 0 <= level < len(attributes[name].levels)
        ]
        if problems:
            raise BadKeys(*problems)
    for name, level in wanted.items():
        curriculum.set_attr_level(name, level)
    config = curriculum.generate_configuration()
    names = [name for attribute in wanted for name in _fields_of(attributes[attribute])]
    if twice := [name for name in names if name in knobs]:
        raise BadKeys(*(f"knobs.{name}: levels of {task} decide it; leave out one of them" for name in twice))
    return {**knobs, **{name: getattr(config, name) for name in names}}


def _classes(task: str) -> tuple[type[Any], type[Any]]:
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise BadKeys(f"task {task!r} is unknown, {nearest(task, DATASETS)}")
    dataset_class, config_class = DATASETS[task]
    return dataset_class, config_class


def _fields_of(attribute: Any) -> list[str]:
    if hasattr(attribute, "field_name"):
        return [attribute.field_name]
    return [attribute.lower_field_name, attribute.upper_field_name]
