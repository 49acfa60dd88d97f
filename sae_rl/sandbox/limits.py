"""What one run of a program may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of all processes of one program together, except for ``time_s`` and ``output_kb``."""

    time_s: float = 5.0  # wall-clock time for one input
    memory_mb: int = 512  # resident memory; a page that two processes share counts twice
    num_processes: int = 16  # processes and threads
    files_mb: int = 16  # in /tmp, the only folder that a program can write to
    num_files: int = 4096  # files and folders in /tmp
    output_kb: int = 1024  # on stdout, for one input
