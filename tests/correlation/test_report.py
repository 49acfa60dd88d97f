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

import sae_rl
from sae_rl.algo.estimators import ESTIMATORS, estimate
from sae_rl.config.schema import flat
from sae_rl.correlation.figures import families, figures, has_segments
from sae_rl.correlation.files import save
from sae_rl.correlation.report import FIGURES, MARKDOWN, PAGE, write_report
from sae_rl.correlation.tables import cell, notes_of, tables_of
from sae_rl.evaluation.statistics import Estimate

from ..algo.oracle import make_scores
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
    assert "Gradients need at least four prompts." in notes
    four = Chain.of().sample(4, seed=1)
    renamed = replace(four, names=tuple(name.replace("monte", "mount") for name in four.names))
    notes = json.dumps(notes_of(figures(renamed)))
    assert "No estimator is called monte_carlo" in notes and "Gradients need" not in notes


def test_a_folder_without_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measurements"):
        write_report(tmp_path)


def test_equal_returns_are_said() -> None:
    made = made_up_measurements()
    equal = replace(made, returns=torch.ones_like(made.returns), continued=torch.ones_like(made.continued))
    told = "All responses and continuations have the same return, so that every reference advantage is 0."
    assert told in notes_of(figures(equal, num_resamples=20))
    assert told not in notes_of(figures(made, num_resamples=20))


def test_outcomes_go_by_the_runs_pass_score(tmp_path: Path) -> None:
    sample = Chain.of().sample(20, seed=3)
    partial = replace(sample, batch=replace(sample.batch, rewards=sample.batch.rewards * 0.4 + 0.2))

    def outcomes(pass_score: float) -> list[tuple[str, int]]:
        save(partial, tmp_path)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"evaluation": {"pass_score": pass_score}}))
        write_report(tmp_path)
        tree = json.loads((tmp_path / FIGURES).read_text())
        return [(one["label"], one["tokens"]) for one in tree["slices"].get("outcome", [])]

    right = 8 * int(sample.batch.rewards.sum())
    assert outcomes(0.5) == [("right", right), ("wrong", 20 * 2 * 8 - right)]
    assert outcomes(1.0) == outcomes(0.1) == [], "all are wrong, and all are right"


def test_estimators_without_segments_have_none() -> None:
    """Those are the ones whose advantages are the same wherever segments open."""
    sample = Chain.of().sample(20, seed=3)
    nowhere = torch.zeros(sample.batch.num_tokens, dtype=torch.bool).index_fill(0, sample.batch.offsets[:-1], True)
    values = torch.rand(sample.batch.num_tokens, generator=torch.Generator().manual_seed(0))
    scores = replace(make_scores(sample.batch), values=values)
    token_rewards = torch.zeros(sample.batch.num_tokens).index_copy(
        0, sample.batch.offsets[1:] - 1, sample.batch.rewards
    )
    for name, make in ESTIMATORS.items():
        one, other = (
            estimate(make(), sample.batch, scores, token_rewards, opens).advantages
            for opens in (nowhere, ~nowhere | nowhere)
        )
        assert has_segments({"estimator.name": name}) == (not torch.equal(one, other)), name
    assert has_segments({"estimator.name": "gae", "value_source.name": "monte_carlo"})
    tree = figures(
        sample, settings={"gae": {"estimator.name": "gae"}, "sae": {"estimator.name": "sae"}}, num_resamples=20
    )
    rows = {row[0]: row for row in tables_of(tree)[0].rows}
    assert rows["gae"][1] == rows["gae"][-1] == "-" and "-" not in (rows["sae"][1], rows["sae"][-1])


def test_the_papers_reference_takes_segments_that_were_measured(tmp_path: Path) -> None:
    sample = Chain.of().sample(20, seed=3)
    for boundaries, expected in (
        (["fixed", "closes"], "fixed"),
        (["closes", "sae"], "sae"),
        ([], "sae"),
        (["no"], "sae"),
    ):
        save(sample, tmp_path)
        (tmp_path / "correlation.yaml").write_text(yaml.safe_dump({"correlation": {"boundaries": boundaries}}))
        write_report(tmp_path)
        assert json.loads((tmp_path / FIGURES).read_text())["segments_of"] == expected, boundaries


def test_the_default_estimators_have_families() -> None:
    tree = yaml.safe_load((Path(sae_rl.__file__).parents[1] / "conf" / "correlate.yaml").read_text())
    settings = {name: flat(own) for name, own in tree["correlation"]["estimators"].items()}
    found = families([*settings], settings)
    assert [number for number, _ in found["segmenter.num_tokens as in fixed_50"]] == [50, 100, 200]
    assert {key.split()[0] for key in found} == {"segmenter.p", "estimator.lam", "segmenter.num_tokens"}
