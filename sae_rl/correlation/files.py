"""The folder that ``sae-rl correlate`` writes.

measurements.safetensors  every tensor of `Measurements`
responses.parquet         the responses with their prompts and texts, in the format of recorded rollouts
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_rl.correlation.measurements import Measurements
from sae_rl.types import Batch
from sae_rl.whole_files import whole_file

TENSORS, RESPONSES = "measurements.safetensors", "responses.parquet"
BATCH = "batch."  # before the names of the batch's tensors
ABOUT = "about"  # in the file's metadata, which has one entry: the order of several would differ from file to file


def save(measurements: Measurements, folder: Path) -> None:
    """Writes ``measurements.safetensors`` into ``folder``, which it makes. A killed process leaves no partial file."""
    batch = measurements.batch
    tensors = _tensors(measurements) | {BATCH + name: flat for name, flat in _tensors(batch).items()}
    write_tensors(folder / TENSORS, tensors, {"names": measurements.names, "temperature": batch.temperature})


def load(folder: Path) -> Measurements:
    """What `save` wrote. Raises ValueError if the folder has no measurements, or a file that was cut."""
    tensors, about = read_tensors(folder / TENSORS)
    try:
        of_batch = {name.removeprefix(BATCH): flat for name, flat in tensors.items() if name.startswith(BATCH)}
        own = {name: flat for name, flat in tensors.items() if not name.startswith(BATCH)}
        batch = Batch(temperature=about["temperature"], **of_batch)  # type: ignore[arg-type]
        return Measurements(batch=batch, names=tuple(about["names"]), **own)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / TENSORS} holds no measurements of sae-rl correlate ({error})") from error


def write_tensors(file: Path, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """Writes a safetensors file with plain values ``about`` it, and its folder. A killed process leaves no partial file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: flat.contiguous() for name, flat in tensors.items()}
    with whole_file(file) as temporary:
        save_file(contiguous, temporary, {ABOUT: json.dumps(about or {})})


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of `write_tensors` by name, and the values about it. Raises ValueError if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get(ABOUT, "{}"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error


def _tensors(carrier: Measurements | Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(carrier, field.name) for field in fields(carrier)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
