"""One run at a time writes into a folder, on storage that nodes share too, and after a kill.

The owner's lock file says who it is, and its modification time is the owner's last sign of life. A lock is taken over if its
owner's process is gone, or, where that cannot be seen from here, if it gave no sign of life for a minute. Ages are those of
the storage's clock, since clocks of nodes differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sae_rl.settings import ConfigError

LOCK = ".running.json"
BEAT_S = 10.0
DEAD_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process that writes into a folder."""

    host: str
    namespace: str  # where its process number counts
    pid: int
    created: float  # when the process began; another one may get its number later
    since: str
    nonce: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            namespace=_namespace(),
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            nonce=secrets.token_hex(8),
        )

    @classmethod
    def read(cls, lock: Path) -> Owner | None:
        """The owner of a lock; None: the file is being written, or is none of ours."""
        try:
            return cls(**json.loads(lock.read_text()))
        except (ValueError, TypeError):
            return None

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None: it cannot be seen from here."""
        if (self.host, self.namespace) != (socket.gethostname(), _namespace()):
            return None
        try:
            return bool(psutil.Process(self.pid).create_time() != self.created)
        except psutil.NoSuchProcess:
            return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which it creates. If another process takes it over, this one ends as by SIGTERM.

    Raises:
        ConfigError: another run holds it; the message says which one, and since when.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = folder / LOCK, Owner.this_process()
    _acquire(lock, owner)
    released = threading.Event()
    beats = threading.Thread(target=_beat, args=(lock, owner, released), name="run lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        released.set()
        beats.join()
        if _is_held(lock, owner):
            lock.unlink()


def _acquire(lock: Path, owner: Owner) -> None:
    while True:
        with contextlib.suppress(FileExistsError):
            with lock.open("x") as file:
                json.dump(asdict(owner), file)
            return
        with contextlib.suppress(FileNotFoundError):  # its owner ended just now
            held, age = Owner.read(lock), _age(lock)
            is_gone = None if held is None else held.is_gone()
            if not is_gone and (is_gone is False or age < DEAD_S):
                raise ConfigError([_refusal(lock, held, age)])
            _remove(lock, held)


def _refusal(lock: Path, held: Owner | None, age: float) -> str:
    who = "" if held is None else f" (process {held.pid} on {held.host}, since {held.since})"
    return (
        f"output_dir = {lock.parent}: another run writes there{who}, and gave its last sign of life {age:.0f} s ago; wait "
        "for it, end it, or choose another output_dir"
    )


def _remove(lock: Path, held: Owner | None) -> None:
    """Removes the lock of ``held``. If others take it over at the same time, one of them succeeds."""
    aside = lock.with_name(f"{LOCK}.{secrets.token_hex(8)}")
    lock.rename(aside)
    if Owner.read(aside) == held:
        aside.unlink()
    else:  # another process was faster, and this is its new lock
        aside.rename(lock)


def _beat(lock: Path, owner: Owner, released: threading.Event) -> None:
    while not released.wait(BEAT_S):
        if not _is_held(lock, owner):
            print(f"error: another run took over {lock.parent} while this one was suspended", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        with contextlib.suppress(OSError):  # storage may fail for a while
            os.utime(lock)


def _is_held(lock: Path, owner: Owner) -> bool:
    try:
        return Owner.read(lock) == owner
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _age(lock: Path) -> float:
    """Seconds since the lock's last sign of life."""
    with tempfile.NamedTemporaryFile(dir=lock.parent, prefix=LOCK) as now:
        return os.stat(now.name).st_mtime - lock.stat().st_mtime


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
