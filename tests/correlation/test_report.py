"""The report holds the figures, opens in a browser, and says in words what the measurements do not tell."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from sae_rl.correlation.figures import figures
from sae_rl.correlation.files import save
from sae_rl.correlation.report import FIGURES, MARKDOWN, PAGE, write_report
from sae_rl.correlation.tables import cell, notes_of, tables_of
from sae_rl.evaluation.statistics import Estimate

from ..records.test_report import Page
from .chain import NAMES, Chain
from .made_up import made_up_measurements

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("correlation")
    save(Chain.of().sample(60, group_size=3, seed=7), folder)
    estimators = {"gae": {"estimator": {"lam": 0.95}}, "wrong": {"estimator": {"lam": 0.5}}, "left_out": None}
    (folder / "correlation.yaml").write_text(yaml.safe_dump({"correlation": {"estimators": estimators}}))
    console = Console(width=140, record=True, file=(folder / "terminal.txt").open("w"))
    assert write_report(folder, console) == folder / PAGE
    console.file.close()
    return folder


def test_the_files_agree_and_have_every_estimator(folder: Path) -> None:
    tree = json.loads((folder / FIGURES).read_text())
    assert [*tree["estimators"]] == [*NAMES] and tree["segments_of"] == NAMES[2] and tree["baselines"] == [*NAMES[:2]]
    page, markdown = Page((folder / PAGE).read_text()), (folder / MARKDOWN).read_text()
    terminal = (folder / "terminal.txt").read_text()
    for name in NAMES:
        pearson = cell(Estimate(**tree["references"]["token"]["estimators"][name]["pearson"]))
        assert pearson in page.text and pearson in markdown
        assert pearson.partition(" ")[0] in terminal
        worth = cell(Estimate(**tree["gradients"]["estimators"][name]["worth"][0]))
        assert worth in page.text and worth in markdown and worth.partition(" ")[0] in terminal
    assert tree["references"]["token"]["tokens"] == tree["num_tokens"] == 60 * 3 * 8
    assert tree["families"] == {"estimator.lam as in gae": [[0.5, "wrong"], [0.95, "gae"]]}
    assert "estimator.lam as in gae" in page.text
    assert {kind: len(slices) for kind, slices in tree["slices"].items()} == {
        "position": 10, "tokens to the end": 4, "outcome": 2, "probability": 4,
    }  # fmt: skip


def test_differences_are_paired(folder: Path) -> None:
    """The difference from a baseline is that of the values, with a narrower interval than two samples would give."""
    tree = json.loads((folder / FIGURES).read_text())["references"]["token"]["estimators"]
    closes, other = tree[NAMES[3]], tree[NAMES[1]]
    assert closes["minus"][NAMES[0]]["pearson"] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-12)
    paired = other["minus"][NAMES[0]]["pearson"]
    assert paired["value"] == pytest.approx(other["pearson"]["value"] - tree[NAMES[0]]["pearson"]["value"])
    assert paired["high"] - paired["low"] < other["pearson"]["high"] - other["pearson"]["low"]


def test_the_page_needs_no_other_file(folder: Path) -> None:
    page = Page((folder / PAGE).read_text())
    assert not {"script", "link", "img", "iframe"} & set(page.tags) and page.tags.count("svg") > 15
    assert [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("#")] == []


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_opens_in_a_browser_without_an_error(folder: Path) -> None:
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    ended = subprocess.run([CHROMIUM, *options, f"file://{folder / PAGE}"], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ended.stderr and "Fidelity of the gradient" in ended.stdout


def test_another_estimators_segments_can_be_the_reference(folder: Path) -> None:
    measurements = Chain.of().sample(30, seed=8)
    tree = figures(measurements, segments_of=NAMES[4], num_resamples=50)
    own = tree["own_segments"][NAMES[4]]["pearson"]
    assert tree["references"]["segment"]["estimators"][NAMES[4]]["pearson"].value == pytest.approx(own.value)
    with pytest.raises(ValueError, match=r"segments_of is 'ppo', allowed: monte_carlo, gae, sae"):
        figures(measurements, segments_of="ppo")


def test_what_is_not_told_is_said() -> None:
    sample = Chain.of().sample(30, k=1, seed=9)
    tree = figures(replace(sample, gradients=None), num_resamples=50)
    assert notes_of(tree) == [
        "The reliability of the token reference is not known from 1 continuation.",
        "The reliability of the segment reference is not known from 1 continuation.",
        "Gradients were not measured.",
    ]
    assert [table.title for table in tables_of(tree)] == [
        "Advantages", "Difference from monte_carlo", "Difference from gae",
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    noise = replace(
        Chain.of().sample(30, k=2, seed=9),
        continued=torch.randint(0, 2, (30 * 2 * 8, 2), generator=generator).double(),
        gradients=torch.randn(7, 30, 50, generator=generator),
    )
    notes = " ".join(notes_of(figures(noise, num_resamples=200)))
    assert "The reliability of the segment reference is " in notes and "too small to correct correlations" in notes
    assert "The mean gradient of the reference is not told from 0 by 30 prompts" in notes
    assert f"No cosine, since the squared length of its mean gradient is not told from 0: {NAMES[0]}" in notes


def test_a_report_of_the_smallest_measurements(tmp_path: Path) -> None:
    """Two prompts, a failed continuation, soft segments, and no estimator that all are compared with but GAE."""
    for dimension in (4, None):
        save(made_up_measurements(dimension=dimension), tmp_path)
        Page(write_report(tmp_path).read_text())
    notes = json.dumps(notes_of(figures(made_up_measurements(), num_resamples=20)))
    assert "2 prompts are few" in notes and "of the continuations failed their check" in notes
    assert "No estimator is called monte_carlo" in notes


def test_a_folder_without_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measurements"):
        write_report(tmp_path)
