"""Sizes and checksums of files. Writers know them, and readers compare them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

THREADS = 8  # that read files; hashing releases Python's lock


class Digest(NamedTuple):
    """The content of a file."""

    size: int  # bytes
    sha256: str


Digests = dict[str, Digest]  # by path


def digest(file: Path) -> Digest:
    with file.open("rb") as opened:
        return Digest(file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest())


def digests_of(files: Iterable[str | Path]) -> Digests:
    """The digests of files, by the paths that are given. Raises FileNotFoundError if one of them is not there."""
    paths = [Path(file) for file in files]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(map(str, paths), pool.map(digest, paths), strict=True))


def damages(folder: Path, expected: Mapping[str, Digest]) -> list[str]:
    """What is wrong with the files of a folder.

    Args:
        expected: the digest that each file should have, by its path in the folder.

    Returns:
        A phrase for each file that is missing, cannot be read, or has another content. Other files are ignored.
    """

    def damage(name: str) -> str | None:
        then = expected[name]
        try:
            if (size := (folder / name).stat().st_size) != then.size:
                return f"{name} has {size:,} of {then.size:,} bytes"
            now = digest(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if now == then else f"{name} has another content than was written"

    with ThreadPoolExecutor(THREADS) as pool:
        return [found for found in pool.map(damage, expected) if found is not None]
