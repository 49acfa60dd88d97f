"""What the benchmarks share: options of the command line, the environment of peers, and the file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


def parser(doc: str | None, name: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with ``--rounds`` and ``--output``; ``doc`` is the benchmark's description."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=at_least(1), default=rounds)
    made.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    return made


def at_least(least: int) -> Callable[[str], int]:
    """The ``type`` of an option that is an integer of at least ``least``."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text}, allowed: at least {least}")
        return int(text)

    return integer


def find_peers(python: Path) -> Path | None:
    """The interpreter of the peers' environment; prints a note and returns None if it does not exist."""
    if python.exists():
        return python
    print(f"{python} does not exist, so TRL is left out (benchmarks/peers/requirements.txt)")
    return None


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes the results and the machine as JSON, and prints the path."""
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")
    print(f"figures: {path}")
