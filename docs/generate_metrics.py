"""Writes docs/metrics.md from the table that the code checks its metrics against."""

from pathlib import Path

from sae_rl.metrics import markdown_table

HEADER = "# Metrics\n\nWritten by `make docs`.\n\n"


def page() -> str:
    return HEADER + markdown_table()


if __name__ == "__main__":
    (Path(__file__).parent / "metrics.md").write_text(page())
