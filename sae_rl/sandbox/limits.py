"""What one run of a program may use."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of all processes of a program together, unless it says otherwise."""

    time_s: float = 5.0  # for one input, on the clock
    memory_mb: int = 512  # resident; a page that processes share counts for each
    num_processes: int = 16  # and threads
    files_mb: int = 16  # in its temporary folder
    num_files: int = 4096  # and folders, in it
    output_kb: int = 1024  # on stdout, for one input

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limits.{field.name}: found {getattr(self, field.name)}, allowed: above 0")
