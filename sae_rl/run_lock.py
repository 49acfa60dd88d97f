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

from sae_rl.settings import ConfigError

LOCK = ".running.json"
BEAT_S = 10.0
DEAD_S = 60.0
POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process that writes into a folder."""

    host: str
    kernel: str  # the boot and the namespace in which its process number counts
    pid: int
    started: int | None  # another process may get its number later
    since: str
    nonce: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            kernel=_kernel(),
            pid=os.getpid(),
            started=_started(os.getpid()),
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
        return _started(self.pid) != self.started if self.kernel == _kernel() else None


def check_unlocked(folder: Path) -> None:
    """Raises ConfigError as `locked` does, and changes nothing."""
    lock = folder / LOCK
    with contextlib.suppress(OSError):  # there is none; or the folder cannot be used, which others tell
        _refuse(lock, Owner.read(lock))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which it creates. If another process takes it over, this one ends as by SIGTERM.

    Where the owner of a lock cannot be seen from here, it waits for a sign of life, for a minute at most.

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
    while not _created(lock, owner):
        with contextlib.suppress(FileNotFoundError):  # its owner ended just now
            held = Owner.read(lock)
            _refuse(lock, held)
            _remove(lock, held)


def _created(lock: Path, owner: Owner) -> bool:
    try:
        file = lock.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            json.dump(asdict(owner), file)
    except OSError as error:  # a full disk
        lock.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(lock)) from error
    return True


def _is_dead(lock: Path, held: Owner | None) -> bool:
    """Whether a lock's owner has ended."""
    is_gone = None if held is None else held.is_gone()
    if is_gone is not None:
        return is_gone
    last = lock.stat().st_mtime
    while _age(lock) < DEAD_S:
        time.sleep(POLL_S)
        if (
            Owner.read(lock) != held or lock.stat().st_mtime != last
        ):  # opening a file makes NFS ask for its newest state
            return False
    return True


def _refuse(lock: Path, held: Owner | None) -> None:
    """Raises ConfigError if a lock's owner lives."""
    if _is_dead(lock, held):
        return
    who = "" if held is None else f" (process {held.pid} on {held.host}, since {held.since})"
    found = f"output_dir = {lock.parent}: another run writes there{who}, and gave its last sign of life"
    raise ConfigError([f"{found} {_age(lock):.0f} s ago; wait for it, end it, or choose another output_dir"])


def _remove(lock: Path, held: Owner | None) -> None:
    """Removes the lock of ``held``. Others that take it over at the same time wait for their turn."""
    turn = lock.with_name(f"{LOCK}.turn")
    try:
        turn.open("x").close()
    except FileExistsError:
        if _age(turn) > DEAD_S:  # who had it died
            turn.unlink(missing_ok=True)
        time.sleep(POLL_S / 10)
        return
    try:
        if Owner.read(lock) == held:
            lock.unlink()
    finally:
        turn.unlink()


def _beat(lock: Path, owner: Owner, released: threading.Event) -> None:
    while not released.wait(BEAT_S):
        if not _is_held(lock, owner):
            print(
                f"error: the lock {lock} is gone or another run's, as after a suspension: this run ends",
                file=sys.stderr,
            )
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


def _age(file: Path) -> float:
    """Seconds since the last sign of life that a file shows."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=LOCK) as now:
        return os.stat(now.name).st_mtime - file.stat().st_mtime


def _kernel() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the boot, which no change of the clock moves; None: it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(rest[18])
