"""What a test of this folder needs: a GPU, and for some files more libraries."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

KIND = os.environ.get("SAE_RL_GPU_TESTS_DEVICE", "cuda")
NO_GPU = "no GPU here"


def has_device() -> bool:
    return KIND != "cuda" or torch.cuda.is_available()


def needs(*packages: str) -> None:
    """Skips the module that calls this where a package is missing. Nothing is imported, since vLLM takes seconds."""
    missing = [package for package in packages if find_spec(package) is None]
    if has_device() and missing:
        pytest.skip(f"{missing[0]} is not installed", allow_module_level=True)
