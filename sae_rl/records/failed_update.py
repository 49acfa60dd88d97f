"""The batch of an update that failed, kept for a look at it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch

from sae_rl.types import Batch, Scores, Targets

FAILED_UPDATE = "failed_update.pt"


@contextlib.contextmanager
def batch_saved_on_failure(folder: Path, step: int, *inputs: Batch | Scores | Targets) -> Iterator[None]:
    """If the block raises, saves its inputs for `torch.load`, and raises RuntimeError with the path of the file."""
    try:
        yield
    except Exception as error:
        path = folder / FAILED_UPDATE
        try:
            torch.save({f.name: getattr(part, f.name) for part in inputs for f in fields(part)}, path)
            kept = f"its batch is in {path}"
        except (OSError, RuntimeError) as unsaved:  # a full disk must not hide the first error
            path.unlink(missing_ok=True)
            kept = f"its batch could not be written to {path} ({unsaved})"
        raise RuntimeError(f"the update of step {step} failed; {kept}. {error}") from error
