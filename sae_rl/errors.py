"""Errors that a person can put right."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """What is wrong with a configuration, one problem per line, each with the key to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))


class BadKeys(ValueError):
    """What is wrong with the keys of a source, a line for each; a line begins with the key."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
