"""The tests and figures for one GPU run on a machine that has torch, Triton, numba and transformers alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
from importlib.machinery import PathFinder

MISSING = {"ray", "vllm", "deepspeed", "pydantic", "hydra", "omegaconf", "pebble", "hypothesis", "pytest_timeout", "xdist"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import pytest
from benchmarks.gpu.__main__ import main
if not sys.argv[1:]:
    sys.exit(pytest.main(["tests/gpu", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-rs"]))
found = main(["--device", "cpu", "--output", sys.argv[1]])["parts"]
failed = {name: part["figures"]["failed"] for name, part in found.items() if "failed" in str(part["figures"])}
assert len(found) == 8 and failed == {"deepspeed": "ModuleNotFoundError: deepspeed is not installed"}, failed
"""


def run(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_all_are_skipped_without_a_gpu() -> None:
    out = run()
    assert " passed" not in out and " failed" not in out
    reasons = {line.rpartition(": ")[2] for line in out.splitlines() if line.startswith("SKIPPED")}
    assert reasons == {"no GPU here"}


@pytest.mark.slow
def test_they_run_on_a_cpu(tmp_path: Path) -> None:
    """Every line but those that need a GPU, DeepSpeed or vLLM; the reference of flash attention takes the kernel's place."""
    out = run(SAE_RL_GPU_TESTS_DEVICE="cpu")
    assert " passed" in out and " failed" not in out
    assert "deepspeed is not installed" in out and "vllm is not installed" in out
    run(str(tmp_path / "gpu.json"))
