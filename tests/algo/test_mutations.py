"""Deliberate mistakes in a copy of the code: each is caught by the tests that are named beside it, which pass without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    file: str
    right: str
    wrong: str
    caught_by: str


RECURSION, ESTIMATORS = "tests/algo/test_recursion.py", "tests/algo/test_estimators.py"
MUTATIONS = {
    "boundary off by one": Mutation(
        "algo/recursion_cpu.py",
        "    advantage = delta + decay * advantage",
        "    advantage = delta + decays[0, np.uintp(tokens.weights[t])] * advantage",
        ESTIMATORS,
    ),
    "lambda and 1 swapped": Mutation(
        "algo/recursion_cpu.py",
        "decays[0, 0], decays[0, 1] = gamma, gamma * lam",
        "decays[0, 1], decays[0, 0] = gamma, gamma * lam",
        ESTIMATORS,
    ),
    "reward on the wrong token": Mutation(
        "algo/shaping.py",
        "token_rewards[last_tokens(batch.offsets)] =",
        "token_rewards[batch.offsets[:-1]] =",
        "tests/algo/test_shaping.py",
    ),
    "first token not forced": Mutation(
        "algo/segmenters.py",
        "return opens.index_fill(0, batch.offsets[:-1], True)",
        "return opens",
        "tests/algo/test_segmenters.py",
    ),
    "offsets shifted by one": Mutation(
        "algo/recursion_cpu.py",
        "np.uintp(responses.offsets[response + 1]), state",
        "np.uintp(responses.offsets[response + 1] - 1), state",
        RECURSION,
    ),
    "values of the next response leak in": Mutation(
        "algo/recursion.py",
        "final_values = torch.zeros(num_responses, dtype=torch.float64, device=values.device)",
        "final_values = torch.cat([values[offsets[1:-1]], values.new_zeros(1)]).double()",
        ESTIMATORS,
    ),
    "whitening per micro-batch": Mutation(
        "driver.py",
        "advantages=algorithm.whitening(targets.advantages, batch.action_mask)",
        "advantages=__import__('torch').cat([algorithm.whitening(a) for a in targets.advantages.chunk(2)])",
        "tests/driver/test_loop.py",
    ),
}


def run(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not slow and not alone", *tests]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


def copied(folder: Path) -> Path:
    for name in ("sae_rl", "tests", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_copy_is_what_is_tested_and_passes(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    code = "import sae_rl.types as t; print(t.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout.strip()
    assert Path(found) == folder / "sae_rl" / "types.py"
    done = run(folder, sorted({mutation.caught_by for mutation in MUTATIONS.values()}))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_caught(name: str, tmp_path: Path) -> None:
    mutation, folder = MUTATIONS[name], copied(tmp_path)
    file = folder / "sae_rl" / mutation.file
    source = file.read_text()
    assert source.count(mutation.right) == 1, f"{mutation.file} has changed: {mutation.right!r} is not in it once"
    file.write_text(source.replace(mutation.right, mutation.wrong))
    done = run(folder, [mutation.caught_by])
    assert done.returncode == 1, done.stdout[-3000:]
    assert "TypingError" not in done.stdout and "NameError" not in done.stdout, "the mistake must compile"
