"""One run at a time in a folder: refused while its owner lives, taken over at once after a kill, and by one process only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sae_rl import run_lock
from sae_rl.run_lock import LOCK, Owner, locked
from sae_rl.settings import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from sae_rl import run_lock
run_lock.BEAT_S = 0.05
try:
    with run_lock.locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except run_lock.ConfigError as error:
    print(error, flush=True)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Processes that hold the lock of ``tmp_path`` for some seconds, or print why they cannot."""
    started: list[subprocess.Popen[str]] = []

    def call(seconds: float = 60) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def leave(folder: Path, age: float, **changes: Any) -> Owner:
    """A lock that another owner left, with its last sign of life ``age`` seconds ago."""
    owner = replace(Owner.this_process(), **({"nonce": "other"} | changes))
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    os.utime(folder / LOCK, (time.time() - age,) * 2)
    return owner


def test_the_second_run_is_refused_until_the_first_ends(tmp_path: Path, start: Start) -> None:
    first = start()
    assert said(first) == "held"
    with pytest.raises(
        ConfigError, match=rf"{tmp_path}: another run writes there \(process {first.pid} on \S+, since 20"
    ):
        locked(tmp_path).__enter__()
    first.kill()  # and with it no chance to remove its lock
    first.wait()
    with locked(tmp_path):
        assert Owner.read(tmp_path / LOCK) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_cannot_be_seen_keeps_its_lock_if_it_gives_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            os.utime(tmp_path / LOCK)

    monkeypatch.setattr(run_lock.time, "sleep", wait)
    leave(tmp_path, 50, host="node-7", kernel="that of node-7")
    with pytest.raises(ConfigError, match=r"on node-7, since .*last sign of life 0 s ago"):
        locked(tmp_path).__enter__()
    leave(tmp_path, 70, kernel="that of node-7")
    with locked(tmp_path):
        pass
    assert len(waited) == 2, "a lock of more than a minute is taken over at once"


def test_a_process_that_cannot_be_seen_and_gives_no_sign_of_life_loses_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a run that is requeued on another node right after a kill."""
    monkeypatch.setattr(run_lock, "DEAD_S", 0.3)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)
    leave(tmp_path, 0, kernel="that of node-7")
    started = time.monotonic()
    with locked(tmp_path):
        assert 0.2 < time.monotonic() - started < 10


def test_a_dead_process_that_nobody_has_waited_for_is_gone(tmp_path: Path, start: Start) -> None:
    first = start()
    assert said(first) == "held"
    first.kill()
    while "Z" not in Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    with locked(tmp_path):
        pass


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(run_lock.json, "dump", full)
        locked(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_lives_keeps_its_lock_however_old_it_looks(tmp_path: Path) -> None:
    """Storage that failed for a while let no sign of life through."""
    leave(tmp_path, 1000)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        locked(tmp_path).__enter__()


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    leave(tmp_path, 0, started=1)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}'])
def test_a_lock_that_cannot_be_read(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be being written right now."""
    (tmp_path / LOCK).write_text(content)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ConfigError, match="another run writes there, and gave its last"),
    ):
        patch.setattr(run_lock.time, "sleep", lambda _: leave(tmp_path, 0))
        locked(tmp_path).__enter__()
    (tmp_path / LOCK).write_text(content)
    os.utime(tmp_path / LOCK, (1, 1))
    with locked(tmp_path):
        pass


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_suspended_run_ends_when_it_finds_that_another_took_over(tmp_path: Path, start: Start) -> None:
    first = start()
    assert said(first) == "held"
    first.send_signal(signal.SIGSTOP)
    other = leave(tmp_path, 0, nonce="new")
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=20) == -signal.SIGTERM
    assert first.stderr is not None and "is gone or another run's, as after a suspension" in first.stderr.read()
    assert Owner.read(tmp_path / LOCK) == other, "the new owner keeps it"


@pytest.mark.slow
def test_one_of_many_takes_a_dead_lock_over(tmp_path: Path, start: Start) -> None:
    for _ in range(3):
        leave(tmp_path, 0, started=1)
        contenders = [start(3) for _ in range(4)]
        answers = [said(process) for process in contenders]
        assert sorted(answer == "held" for answer in answers) == [False, False, False, True], answers
        for process in contenders:
            process.wait()
        assert list(tmp_path.iterdir()) == []
