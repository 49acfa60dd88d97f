"""Draws docs/demo.svg, the training reward of runs of the demo:

python docs/generate_demo.py outputs/demo_0 outputs/demo_1
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from sae_rl.analysis.plots import COLOURS, Curve, draw
from sae_rl.records.records import read_jsonl


def curve_of(folder: Path, colour: str) -> Curve:
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "train"]
    seed = yaml.safe_load((folder / "config.yaml").read_text())["seed"]
    return Curve(
        x=[row["step"] for row in rows],
        y=[row["rollout/reward_mean"] for row in rows],
        label=f"seed {seed}",
        colour=colour,
    )


def main(folders: list[Path]) -> None:
    figure = draw([curve_of(folder, colour) for folder, colour in zip(folders, COLOURS, strict=False)], size=(6.4, 2.6))
    figure.axes[0].set_ylabel("training reward")
    figure.savefig(Path(__file__).with_name("demo.svg"), metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(argument) for argument in sys.argv[1:]])
