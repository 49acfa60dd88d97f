"""Writes docs/metrics.md from the table that the code checks its metrics against."""

from pathlib import Path

from sae_rl.records.metrics import METRICS

HEADER = """# Metrics

Written by `make docs`. Where there are several evaluation data sets, `evaluation/...` is over all prompts, and
`evaluation/NAME/...` is the same metric on the data set called NAME: [evaluation.md](evaluation.md).

"""


def page() -> str:
    escaped = {name: metric.meaning.replace("|", "\\|") for name, metric in METRICS.items()}
    rows = [f"| `{name}` | {METRICS[name].unit or '-'} | {meaning} |" for name, meaning in escaped.items()]
    return HEADER + "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "metrics.md").write_text(page())
