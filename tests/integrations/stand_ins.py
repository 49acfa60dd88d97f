"""Packages on disk that stand in for trainers, which are not installed for the tests."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def write_package(folder: Path, name: str, version: str, files: Mapping[str, str]) -> None:
    """Writes a package, an ``__init__.py`` in each of its folders, and the metadata of its version."""
    for path, text in files.items():
        file = folder / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in file.parents:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
        file.write_text(text)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> Iterator[None]:
    """Puts a package first on the path. Afterwards neither it nor its integration is loaded."""
    monkeypatch.syspath_prepend(str(folder))
    finders = list(sys.meta_path)
    forget(name)
    try:
        yield
    finally:
        sys.meta_path[:] = finders
        forget(name)


def forget(name: str) -> None:
    for module in [
        module for module in sys.modules if module.split(".")[0] == name or module == f"sae_rl.integrations.{name}"
    ]:
        del sys.modules[module]
    importlib.invalidate_caches()
