"""A run leaves its report however it ends, and the report hides no error."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_rl.commands import train as module
from sae_rl.commands.preflight import Ready
from sae_rl.commands.run_folder import write_config
from sae_rl.commands.train import run_training
from sae_rl.digests import Digests
from sae_rl.protocols import Metrics
from sae_rl.records.records import Records
from sae_rl.run import Run
from sae_rl.run_lock import LOCK, locked
from sae_rl.settings import ConfigError
from tests.conftest import call
from tests.driver.scripted import ScriptedWorkers, make_config, make_run


class Ending(ScriptedWorkers):
    """Ends the run with ``end`` when the weights of version 2 are sent."""

    end: BaseException | None = None

    def sync_weights(self, version: int) -> Metrics:
        if version == 2 and self.end is not None:
            raise self.end
        return super().sync_weights(version)

    def save(self, folder: Path) -> Digests:
        written = super().save(folder)
        (folder / "hf").mkdir()
        return written


@pytest.fixture
def ended(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run of three steps with scripted workers that ends with an error, or well: its folder."""

    def train(end: BaseException | None, *overrides: str) -> Path:
        @contextlib.contextmanager
        def assembled(ready: Ready, *_: Any) -> Iterator[Run]:
            config, workers = ready.config, Ending()
            workers.end = end
            with Records(config, config.output_dir, first_step=0) as records:
                write_config(config, records)
                made = make_run(config, workers)
                yield Run(**{name: getattr(made, name) for name in made.__slots__} | {"records": records})

        monkeypatch.setattr(module, "assembled", assembled)
        options = ["logger=off", "logger.jsonl=true", "logger.rollouts_every_steps=1", "logger.console=plain"]
        config = make_config(tmp_path / "run", "steps=3", f"model.path={tiny_model}", *options, *overrides)
        with contextlib.nullcontext() if end is None else pytest.raises(type(end), match=re.escape(str(end)) or None):
            run_training(config)
        return config.output_dir

    return train


@pytest.mark.parametrize(
    ("end", "num_steps"),
    [(None, 3), (KeyboardInterrupt(), 1), (RuntimeError("a worker died"), 1)],
    ids=["well", "Ctrl-C", "error"],
)
def test_every_run_leaves_a_report(
    ended: Callable[..., Path],
    end: BaseException | None,
    num_steps: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = ended(end)
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert f"{num_steps} training steps" in page and "Responses of step" in page


def test_a_report_that_cannot_be_written_hides_no_error(
    ended: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path) -> Path:
        raise ZeroDivisionError("a bug of the report")

    monkeypatch.setattr("sae_rl.commands.report.write_run_report", broken)
    folder = ended(RuntimeError("a worker died"))
    assert "no report.html: a bug of the report" in capsys.readouterr().out
    assert not (folder / "report.html").exists()


def test_a_refused_run_leaves_none(ended: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = ended(ConfigError(["cluster.policy.num_workers = 9: too many"]))
    assert "report" not in capsys.readouterr().out and not (folder / "report.html").exists()


def test_the_command_writes_the_same_page(ended: Callable[..., Path]) -> None:
    folder = ended(None)
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    outcome = call("report", str(folder))
    assert (outcome.code, outcome.stdout) == (0, f"{folder / 'report.html'}\n")
    assert (folder / "report.html").read_text() == page


def test_a_second_run_is_refused_before_anything_is_read(ended: Callable[..., Path], tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        ended(ConfigError([f"output_dir = {tmp_path}/run: another run writes there (process {os.getpid()} on"]))
        assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_run_that_was_overtaken_while_it_was_checked_is_refused(
    ended: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = module.prepare_training

    def slowly(*arguments: Any) -> Ready:
        ready = prepare(*arguments)
        (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
        return ready

    monkeypatch.setattr(module, "prepare_training", slowly)
    ended(ConfigError([f"output_dir = {tmp_path}/run: another run wrote there meanwhile; start again"]))
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoints"]
