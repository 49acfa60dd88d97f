"""What pyproject.toml asks for: the core takes the versions that a trainer has, and training pins its own."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("name", "versions"),
    [
        ("torch", ["2.6.0", "2.8.0", "2.15.0"]),
        ("numpy", ["1.24.4", "1.26.4", "2.5.5"]),
        ("numba", ["0.57.1", "0.61.2", "0.68.1"]),
    ],
)
def test_the_core_takes_the_versions_that_make_test_core_ran_with(name: str, versions: list[str]) -> None:
    wanted = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
    assert set(wanted) == {"torch", "numpy", "numba"}
    assert all(wanted[name].specifier.contains(version) for version in versions)


def test_the_core_takes_python_3_10_to_3_13() -> None:
    pythons = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(8, 16) if pythons.contains(f"3.{minor}.1")] == [10, 11, 12, 13]


def test_training_pins_the_torch_of_the_makefile_and_the_locks() -> None:
    (pinned,) = [text for text in PROJECT["optional-dependencies"]["train"] if text.startswith("torch")]
    assert pinned in (ROOT / "locks" / "gpu.txt").read_text().splitlines()
    found = re.search(r"^TORCH := (\S+)\+cpu$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert found is not None and found[1] == pinned
