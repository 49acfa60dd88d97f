"""Temporary folders that programs wrote to: whatever their shape, they are removed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__)
BLOCK = 512  # bytes, of st_blocks
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def temporary_folder(prefix: str, within: str | None, limit_s: float) -> Iterator[str]:
    """For the time of a ``with``; see `remove`."""
    folder = tempfile.mkdtemp(prefix=prefix, dir=within)
    try:
        yield folder
    finally:
        remove(folder, limit_s)


def holds_more(path: str, num_bytes: int, num_files: int) -> bool:
    """Whether there is more in a folder than that, at any depth; what cannot be looked at is more."""
    used, found, folders = 0, 0, [path]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    used += entry.stat(follow_symlinks=False).st_blocks * BLOCK
                    found += 1
                    if used > num_bytes or found > num_files:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError:  # closed by its program, or its path is too long
            return True
    return False


def remove(path: str, limit_s: float) -> None:
    """Removes a folder with all that is in it, at any depth. It never raises: what cannot be removed stays, and is said.

    Args:
        limit_s: what is not removed by then stays too.
    """
    deadline = time.monotonic() + limit_s
    try:
        top = os.open(path, FOLDER)
        try:
            _empty(top, deadline)
        finally:
            os.close(top)
        os.rmdir(path)
    except OSError as error:
        logger.warning("a temporary folder of the code sandbox stays: %s (%s)", path, error)


def _empty(top: int, deadline: float) -> None:
    """A folder inside is emptied of its files, and its folders move to the top: no path gets long, no call nests.

    Raises:
        OSError: something cannot be removed, or not until the deadline.
    """
    new_names = (f".removing_{n}_{time.monotonic_ns()}" for n in itertools.count())
    folders = _move_folders(top, top, new_names, deadline)
    while folders:
        name = folders.pop()
        opened = os.open(name, FOLDER, dir_fd=top)
        try:
            folders += _move_folders(opened, top, new_names, deadline)
        finally:
            os.close(opened)
        os.rmdir(name, dir_fd=top)


def _move_folders(folder: int, top: int, new_names: Iterator[str], deadline: float) -> list[str]:
    """Their new names; files are removed."""
    moved = []
    with os.scandir(folder) as listed:
        entries = list(listed)
    for entry in entries:
        if time.monotonic() > deadline:
            raise TimeoutError("removing it takes too long")
        if entry.is_dir(follow_symlinks=False):
            moved.append(next(new_names))
            os.chmod(
                entry.name, 0o700, dir_fd=folder
            )  # its program may have closed it, and to move it is to write to it
            os.rename(entry.name, moved[-1], src_dir_fd=folder, dst_dir_fd=top)
        else:
            os.unlink(entry.name, dir_fd=folder)
    return moved
