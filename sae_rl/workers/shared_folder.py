"""Whether files that workers write arrive where the driver reads them. On local disks of several nodes they do not."""

from __future__ import annotations

import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sae_rl.digests import Digests
from sae_rl.settings import ConfigError
from sae_rl.workers.group import WorkerError, WorkerGroup

ARRIVES_S = 30.0  # the longest wait for a file of another node, which network file systems may show late
POLL_S = 0.2


def check_shared(groups: Mapping[str, WorkerGroup], output_dir: Path) -> None:
    """Lets the driver and every worker of these roles see a file of each other in ``output_dir``.

    Raises:
        ConfigError: a worker's ``output_dir`` is not the driver's; the message names the nodes.
    """
    nonce = output_dir.absolute() / f".nonce_{secrets.token_hex(8)}"
    nonce.mkdir(parents=True)
    apart: dict[str, list[str]] = {}
    try:
        for role, group in groups.items():
            answers = group.run(lambda worker: worker.answer_nonce.remote(nonce))
            for rank, answer in enumerate(answers):
                if answer is None or not arrives((nonce / answer).exists):
                    apart.setdefault(_host(group, rank), []).append(f"{role} {rank}")
    finally:
        shutil.rmtree(nonce, ignore_errors=True)
    if apart:
        where = "; ".join(f"{', '.join(names)} on {host}" for host, names in apart.items())
        raise ConfigError(
            [
                f"output_dir = {output_dir}: the driver on {socket.gethostname()} and these workers do not see each other's "
                f"files there: {where}. Checkpoints would be lost: set output_dir to a folder that all nodes share"
            ]
        )


def answer_nonce(nonce: Path) -> str | None:
    """Runs in a worker: writes a file of its own into the driver's folder and returns its name; None: no such folder."""
    if not arrives(nonce.is_dir):
        return None
    name = secrets.token_hex(8)
    (nonce / name).touch()
    return name


def check_written(group: WorkerGroup, ranks: Sequence[Digests]) -> Digests:
    """Checks that the driver finds every file that these ranks, from 0 on, wrote.

    Args:
        ranks: the files of each rank, by their absolute paths.

    Returns:
        The files of all ranks.

    Raises:
        WorkerError: a rank wrote nothing, or a file is missing or of another size where the driver looks.
    """
    for rank, written in enumerate(ranks):
        writer = f"{group.role} worker {rank} on {_host(group, rank)}"
        if not written:
            raise WorkerError(f"{writer} wrote no file of the checkpoint")
        for file, (size, _) in written.items():
            if not arrives(lambda file=file, size=size: _size(file) == size):  # type: ignore[misc]
                raise WorkerError(
                    f"{writer} wrote {file} with {size:,} bytes, but the driver on {socket.gethostname()} finds "
                    f"{'no such file' if _size(file) is None else f'{_size(file):,} bytes'}: output_dir must be on storage "
                    "that all nodes share, with enough space"
                )
    return {file: digest for written in ranks for file, digest in written.items()}


def arrives(is_there: Callable[[], bool]) -> bool:
    """Waits until ``is_there``, at most `ARRIVES_S`."""
    deadline = time.monotonic() + ARRIVES_S
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _size(file: str) -> int | None:
    return Path(file).stat().st_size if Path(file).exists() else None


def _host(group: WorkerGroup, rank: int) -> str:
    place = group.places[rank]
    return "an unknown node" if place is None else place.host
