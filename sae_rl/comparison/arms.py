"""Arms: runs whose configurations differ in nothing but their seeds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from sae_rl.comparison.curves import RunCurves
from sae_rl.names import nearest

# Keys, or sections, that change neither what is learned nor how it is measured.
IGNORED = ("name", "output_dir", "resume", "dry_run", "logger", "checkpoint", "cluster")
PARTS_OF_HELD_OUT = ("evaluation", "task.evaluation", "steps")  # compared on their own
ABSENT = object()

Values = Mapping[str, Any]


def with_arms(runs: Sequence[RunCurves], arm_by: Sequence[str] = ()) -> tuple[list[RunCurves], list[str]]:
    """The runs with the names of their arms and their seeds, and notes about settings that differ inside arms.

    The name of an arm is the shortest set of overrides that no other arm has. CSV files keep the names they hold.

    Args:
        arm_by: keys or sections, such as ``algorithm``, that tell arms apart; without any, all keys do.

    Raises:
        ValueError: no run has such a key.
    """
    configured = [run for run in runs if run.settings]
    known = list(dict.fromkeys(key for run in configured for key in run.settings))
    if unknown := [key for key in arm_by if not any(_is_in(name, [key]) for name in known)]:
        raise ValueError(f"--arm-by {unknown[0]}: no run has that key, {nearest(unknown[0], known)}")
    settings = [_without_seeds(run.settings, run.seed) for run in configured]
    settings, templates = _templates(settings)
    differing = [key for key in known if len({repr(each.get(key)) for each in settings}) > 1]
    ours = [key for key in differing if not _is_in(key, (*IGNORED, *PARTS_OF_HELD_OUT))]
    chosen = [key for key in differing if _is_in(key, arm_by)] if arm_by else ours
    keys = [tuple(repr(each.get(key)) for key in chosen) for each in settings]
    arms = {
        key: {name: each.get(name) for name in chosen if name in each} for key, each in zip(keys, settings, strict=True)
    }
    names = dict(zip(arms, _names(list(arms.values())), strict=True))
    seeds = iter(_seeds(configured))
    named = iter([names[key] for key in keys])
    found = [replace(run, arm=next(named), seed=next(seeds)) if run.settings else run for run in runs]
    shared = [
        key for key in differing if key not in chosen and not _is_in(key, ("name", "output_dir", *PARTS_OF_HELD_OUT))
    ]
    inside = [key for key in shared if any(len(v) > 1 for v in _values_inside(key, keys, settings).values())]
    notes = [f"Paths that differ in the seed are one setting: {each}." for each in templates]
    return found, [*notes, *(f"Runs of one arm differ in {key}." for key in inside)]


def _values_inside(key: str, arms: Sequence[Any], settings: Sequence[Values]) -> dict[Any, set[str]]:
    found: dict[Any, set[str]] = {}
    for arm, each in zip(arms, settings, strict=True):
        found.setdefault(arm, set()).add(repr(each.get(key)))
    return found


def _is_in(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed" and not _is_in(key, PARTS_OF_HELD_OUT)


def _without_seeds(settings: Values, seed: str) -> dict[str, Any]:
    """Without seeds; a path becomes the set of what it may be for any seed, as in ``base_{seed}``."""
    kept = {key: value for key, value in settings.items() if not _is_seed(key)}
    paths = {key: _seed_forms(value, seed) for key, value in kept.items() if isinstance(value, str) and "/" in value}
    return {**kept, **paths}


def _seed_forms(path: str, seed: str) -> tuple[str, ...]:
    """A path itself, and with any of the places replaced where the run's seed stands as a number."""
    places = [match.start() for match in re.finditer(rf"(?<!\d){re.escape(seed)}(?!\d)", path)]
    forms = [path]
    for count in range(1, min(len(places), 4) + 1):
        for chosen in combinations(places, count):
            form = path
            for place in reversed(chosen):
                form = f"{form[:place]}{{seed}}{form[place + len(seed) :]}"
            forms.append(form)
    return tuple(forms)


def _templates(settings: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Each path in the one of its forms that most runs share, so that a base model for each seed is one setting.

    Returns:
        The settings; and each template that replaces paths, with its key.
    """
    paths = [{key: forms for key, forms in each.items() if isinstance(forms, tuple)} for each in settings]
    shared = Counter((key, form) for each in paths for key, forms in each.items() for form in forms)
    chosen = [{key: max(forms, key=lambda f, k=key: shared[k, f]) for key, forms in each.items()} for each in paths]  # type: ignore[misc]
    used = (
        f"{key}={own[key]}"
        for of_run, own in zip(paths, chosen, strict=True)
        for key, forms in of_run.items()
        if own[key] != forms[0] and not _is_in(key, (*IGNORED, *PARTS_OF_HELD_OUT))
    )
    return [each | own for each, own in zip(settings, chosen, strict=True)], list(dict.fromkeys(used))


def _seeds(runs: Sequence[RunCurves]) -> list[str]:
    """The seed of each run; where other seeds differ too, and not with it, they follow behind slashes."""
    seeds, settings = [run.seed for run in runs], [run.settings for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each if _is_seed(key) and key != "seed")
    more = [key for key in keys if any(len(v) > 1 for v in _values_inside(key, seeds, settings).values())]
    return ["/".join([run.seed, *(str(run.settings.get(key)) for key in more)]) for run in runs]


def _names(arms: Sequence[Values]) -> list[str]:
    """The shortest set of overrides that distinguishes each arm, written with the shortest unique keys."""
    if len(arms) == 1:
        return ["all runs"]
    labels = _short_keys(list(dict.fromkeys(key for arm in arms for key in arm)))
    return [", ".join(_override(labels[key], arm.get(key, ABSENT)) for key in _shortest(arm, arms)) for arm in arms]


def _shortest(arm: Values, arms: Sequence[Values]) -> tuple[str, ...]:
    """The keys of the smallest set of values that no other arm has; keys that only others have are the last resort."""
    others = [other for other in arms if other is not arm]
    # Names of estimators, segmenters and value sources say more than their knobs.
    own = sorted(arm, key=lambda key: (not key.endswith(".name"), not key.startswith("algorithm.")))
    for keys in (own, [*own, *(key for other in others for key in other)]):
        excluded: dict[frozenset[int], str] = {}  # the arms that differ in a key, and the first such key
        for key in keys:
            differing = (k for k, other in enumerate(others) if other.get(key, ABSENT) != arm.get(key, ABSENT))
            excluded.setdefault(frozenset(differing), key)
        for count in range(1, len(excluded) + 1):
            for chosen in combinations(excluded, count):
                if len(frozenset.union(*chosen)) == len(others):
                    return tuple(excluded[each] for each in chosen)
    raise AssertionError("arms differ in at least one key")


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each key that no other key has; ``estimator`` for ``algorithm.estimator.name``."""
    stems = {key: key.removesuffix(".name") for key in keys}
    labels = {}
    for key, stem in stems.items():
        parts = stem.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [other for name, other in stems.items() if name != key]
        labels[key] = next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), key)
    return labels


def _override(label: str, value: object) -> str:
    if value is ABSENT:
        return f"~{label}"
    return f"{label}={json.dumps(value) if value is None or isinstance(value, bool) else value}"
