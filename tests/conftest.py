"""For every test: an offline, single-threaded process, a tiny model folder, and the command line."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.exactness import FIGURES, Exactness, write

SCRATCH = tempfile.mkdtemp(prefix="sae_rl_")  # a short path, since paths of sockets are limited
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["TMPDIR"] = SCRATCH  # for Ray's logs, and for the files that killed workers leave


@dataclass(frozen=True)
class Outcome:
    """How one call of ``sae-rl`` ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()


CommandLine = Callable[..., Outcome]


def call(*arguments: str) -> Outcome:
    """The real command line, in this process: its imports, which take seconds, are there already."""
    from sae_rl.cli import main

    argv, terminate, code = sys.argv, signal.getsignal(signal.SIGTERM), 0
    stdout, stderr = io.StringIO(), io.StringIO()
    sys.argv = ["sae-rl", *arguments]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as end:
        assert isinstance(end.code, int), end.code
        code = end.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, terminate)
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exactness", help="the file to write the tables of exactness to")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = Exactness()
    # A shell starts background jobs with SIGINT ignored, and the runs that tests interrupt would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    write(config)
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def exactness(request: pytest.FixtureRequest) -> Exactness:
    return request.config.stash[FIGURES]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained one-layer model that knows the words of the task Level, with a context of 512 tokens."""
    from sae_rl.sft import ModelShape, build_model, save
    from sae_rl.tasks.level import Level
    from sae_rl.tasks.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = build_tokenizer(Level().words())
    save(
        build_model(ModelShape(num_hidden_layers=1, max_position_embeddings=512), tokenizer, seed=0), tokenizer, folder
    )
    return folder


@pytest.fixture
def sae_rl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    """``sae_rl("train", "seed=1")``: the real command line, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "SAE_RL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return call
