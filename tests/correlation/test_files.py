"""The folder that holds measurements."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_rl.correlation.files import TENSORS, load, save
from tests.correlation.made_up import made_up_measurements


def assert_equal(one: object, other: object) -> None:
    for field in fields(one):  # type: ignore[arg-type]
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(9), b.nan_to_num(9)), field.name
        elif field.name != "batch":
            assert a == b, field.name


@pytest.mark.parametrize("dimension", [None, 4])
def test_what_was_saved_is_loaded(tmp_path: Path, dimension: int | None) -> None:
    measurements = made_up_measurements(dimension=dimension)
    save(measurements, tmp_path / "folder")
    loaded = load(tmp_path / "folder")
    assert_equal(loaded, measurements)
    assert_equal(loaded.batch, measurements.batch)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == [TENSORS]
    first = (tmp_path / "folder" / TENSORS).read_bytes()
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == first


def test_a_folder_without_measurements_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"measurements\.safetensors cannot be read"):
        load(tmp_path)
    save(made_up_measurements(), tmp_path)
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="no measurements of sae-rl correlate"):
        load(tmp_path)
