"""The overrides of a command line: reading them, and saying what was meant by one that cannot be right."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException

from sae_rl.config.search_path import GROUPS, SearchPath, hydra_with
from sae_rl.names import nearest, paths_to
from sae_rl.settings import ConfigError

HYDRAS_OWN = ("hydra/", "hydra.")  # overrides of Hydra itself, such as hydra/launcher=joblib
SEARCH_PATH, MODE = "hydra.searchpath", "hydra.mode"
PLUG_INS = {  # group -> option -> how to get it
    "hydra/launcher": {
        "joblib": "the plug-in is not installed: pip install hydra-joblib-launcher",
        "ray": "each run starts or joins Ray itself, and cannot be a job of Ray's launcher: use hydra/launcher=joblib",
    },
    "hydra/sweeper": {"optuna": "the plug-in is not installed: pip install hydra-optuna-sweeper"},
}


@dataclass(frozen=True, slots=True)
class Overrides:
    """The overrides of a run or of a sweep, and Hydra with the folders that ``hydra.searchpath`` names."""

    hydra: SearchPath
    parsed: tuple[Override, ...]  # without hydra.searchpath

    @classmethod
    def read(cls, lines: Sequence[str]) -> Overrides:
        """Raises ConfigError for overrides that Hydra cannot read, and for folders that do not exist."""
        parser, parsed, problems = OverridesParser.create(), [], []
        for line in lines:
            try:
                parsed += parser.parse_overrides([line])
            except HydraException:
                problems.append(_unreadable(line))
        if problems:
            raise ConfigError(problems)
        folders = [
            folder for override in parsed if override.key_or_group == SEARCH_PATH for folder in _folders(override)
        ]
        return cls(
            hydra_with(tuple(folders)), tuple(override for override in parsed if override.key_or_group != SEARCH_PATH)
        )

    def forced(self) -> list[str]:
        """The overrides with Hydra's ``++`` before every value, so that pydantic judges keys that ``conf/`` lacks."""
        return [f"++{o.input_line}" if self._is_value(o) else str(o.input_line) for o in self.parsed]

    def alternatives(self, override: Override) -> list[str]:
        """The overrides that stand for this one in the runs of a sweep; for an interval, those of its ends."""
        if not override.is_sweep_override():
            return [str(override.input_line)]
        chosen = override.value()
        if isinstance(chosen, IntervalSweep):
            values: Iterable[object] = (chosen.start, chosen.end)
        elif isinstance(chosen, Glob):
            values = chosen.filter(self.hydra.options(override.key_or_group))
        else:
            values = override.sweep_string_iterator()
        return [f"{override.get_key_element()}={value}" for value in values]

    def several_values(self) -> list[str]:
        """A line for each override with several values, for where there is no sweep."""
        lines = []
        for override in (o for o in self.parsed if o.is_sweep_override()):
            key, value = override.key_or_group, override.get_value_string()
            ways = f"a list is {key}=[{value}], a text {shown_in_shell(key, value)}"
            lines.append(f"{override.input_line}: several values need a sweep, sae-rl train -m; {ways}")
        return lines

    def problems(self) -> list[str]:
        """A line for each wrong group and option."""
        return [problem for override in self.parsed if (problem := self._problem(override))]

    def unknown_keys(self, known: Iterable[str]) -> list[Override]:
        """The overrides of values whose key begins with none of the ``known`` words."""
        known = {*known, "hydra"}
        keys = ((override, override.key_or_group) for override in self.parsed)
        unknown = [(o, key) for o, key in keys if "/" not in key and key.split(".")[0] not in known]
        return [
            o for o, key in unknown if key in GROUPS or not self.is_group(key)
        ]  # a user may have groups of their own

    def is_group(self, key: str) -> bool:
        """Whether an override of this key chooses an option of a group."""
        return key in GROUPS or ("." not in key and bool(self.hydra.options(key)))

    def _is_value(self, override: Override) -> bool:
        key = override.key_or_group
        return override.type is OverrideType.CHANGE and not self.is_group(key) and not key.startswith(HYDRAS_OWN)

    def _problem(self, override: Override) -> str | None:
        """What is wrong with a group or its option. The typed tree judges keys."""
        key, value, line = override.key_or_group, override.value(), override.input_line
        options = self.hydra.options(key)
        if key.startswith(HYDRAS_OWN):
            plug_ins = PLUG_INS.get(key, {})
            if plug_ins and value not in options:
                return f"{line}: {plug_ins.get(str(value)) or nearest(str(value), [*options, *plug_ins])}"
            return None
        group = key.replace(".", "/")
        if "." in key and group in GROUPS and isinstance(value, str):
            return f"{line}: write {group}={value}"
        if not self.is_group(key):
            return self._no_group(override) if "/" in key else None
        if override.is_delete() or override.is_sweep_override() or str(value) in options:
            return None
        return f"{line}: no such option, {nearest(str(value), options)}"

    def _no_group(self, override: Override) -> str:
        key, value = override.key_or_group, override.value()
        start = f"{override.input_line}: the configuration has no group {key!r}"
        for parent in map(str, Path(key).parents):
            if str(value) in self.hydra.options(parent):
                return f"{start}; write {parent}={value}"
        hint = nearest(key, GROUPS)
        if hint.startswith("allowed"):
            hint = f"a key has dots: write {str(override.input_line).replace('/', '.', key.count('/'))}"
        return f"{start}, {hint}"


def no_such_key(override: Override, known: Iterable[str], paths: Iterable[str]) -> str:
    """The message about a key whose first word the configuration lacks."""
    key = override.key_or_group
    top = key.split(".")[0]
    return f"{key}: the configuration has no {top!r}, {paths_to(key, paths) or nearest(top, known)}"


def shown_in_shell(key: str, value: str) -> str:
    """``key=value`` as a shell needs it so that Hydra reads ``value`` as text."""
    quote = Quote.double if "'" in value else Quote.single
    line = f"{key}={QuotedString(value, quote).with_quotes()}"
    return f'"{line}"' if not set('"$`\\!') & set(line) else shlex.quote(line)


def _unreadable(line: str) -> str:
    key, equals, value = line.partition("=")
    start = f"cannot read the override {line!r}"
    if not equals:
        return f"{start}: an override is key=value, and ~key removes a key"
    if key != key.strip():
        return f"{start}: no space may stand before ="
    if "/" in key and "." in key:
        return f"{start}: a key has dots, write {key.replace('/', '.')}={value}"
    return f"{start}: quote the value for the shell and for Hydra: {shown_in_shell(key, value)}"


def _folders(override: Override) -> list[str]:
    """The folders of a ``hydra.searchpath``, with their schema."""
    value = override.value()
    if not isinstance(value, list) or not all(isinstance(folder, str) for folder in value):
        raise ConfigError([f"{override.input_line}: write {SEARCH_PATH}=[file:///a/folder], found {value!r}"])
    return [folder if "://" in folder else f"file://{Path(folder).absolute()}" for folder in map(str, value)]
