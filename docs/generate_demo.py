"""Draws docs/demo.svg: reward of the demo's five seeds over training, from the runs that README.md names."""

from __future__ import annotations

import sys
from pathlib import Path

from sae_rl.analysis.plots import Curve, draw
from sae_rl.records.records import read_jsonl

COLOURS = ("c1", "c2", "c3", "c4", "muted")


def main(folders: list[Path]) -> None:
    curves = []
    for seed, (folder, colour) in enumerate(zip(folders, COLOURS, strict=True)):
        rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "train"]
        steps, rewards = [row["step"] for row in rows], [row["rollout/reward_mean"] for row in rows]
        curves.append(Curve(x=steps, y=rewards, label=f"seed {seed}", colour=colour))
    figure = draw(curves, size=(6.4, 2.6), percent=True)
    figure.axes[0].set_ylabel("training reward")
    figure.savefig(Path(__file__).with_name("demo.svg"), metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != len(COLOURS) + 1:
        sys.exit("usage: generate_demo.py FOLDER_OF_SEED_0 ... FOLDER_OF_SEED_4")
    main([Path(argument) for argument in sys.argv[1:]])
