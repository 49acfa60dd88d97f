"""Writes docs/metrics.md from the table that the code checks its metrics against."""

from pathlib import Path

from sae_rl.records.metrics import markdown_table

HEADER = """# Metrics

Written by `make docs`. Where there are several evaluation data sets, `evaluation/...` is over all prompts, and
`evaluation/NAME/...` is the same metric on the data set called NAME: [evaluation.md](evaluation.md).

"""


def page() -> str:
    return HEADER + markdown_table()


if __name__ == "__main__":
    (Path(__file__).parent / "metrics.md").write_text(page())
