"""Writes the table of docs/verifiers.md: the verifiers' names, their knobs, and the first paragraph of their docstrings."""

import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sae_rl.rewards.table import VERIFIERS

PAGE = Path(__file__).parent / "verifiers.md"
TABLE = re.compile(r"(?<=<!-- written by make docs -->\n).*?(?=<!-- end -->)", re.DOTALL)


def knobs(verifier: type[Any]) -> str:
    """Its knobs, with their defaults if they have one."""
    shown = [f.name if f.default is MISSING else f"{f.name}={json.dumps(f.default)}" for f in fields(verifier)]
    return ", ".join(f"`{knob}`" for knob in shown)


def row(name: str, verifier: type[Any]) -> str:
    paragraph = inspect.getdoc(verifier).partition("\n\n")[0]  # type: ignore[union-attr]
    score = " ".join(paragraph.split()).replace("``", "`").replace("|", "\\|")
    return f"| `{name}` | {knobs(verifier)} | {score} |\n"


def page() -> str:
    table = "".join(row(name, verifier) for name, verifier in VERIFIERS.items())
    return TABLE.sub(lambda _: f"| name | knobs | score |\n|---|---|---|\n{table}", PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
