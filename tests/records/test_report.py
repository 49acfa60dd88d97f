"""The report, parsed as by a browser, holds the recorded numbers and needs no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from rich.console import Console

from sae_rl.analysis.report import CURVES, final_table, heldout_parts, pick_responses, reliability_table, write_report
from sae_rl.analysis.run_files import RunFiles
from sae_rl.records.metrics import METRICS, show
from sae_rl.records.rollouts import read_rollouts

from .page_data import data_of, texts_of
from .sample_run import VOCABULARY, WORDS, write_sample_run

VOID = {"meta", "br", "wbr", "input"}


class Page(HTMLParser):
    """Text by class of its element, attributes, and whether every tag was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.stack and data.strip():
            self.texts.append((self.stack[-1][1] or self.stack[-1][0], data))

    @property
    def text(self) -> str:
        return " ".join(" ".join(data for _, data in self.texts).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_sample_run(folder, num_prompts=4)
    return folder


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    write_report(run_dir, run_dir / "out" / "report.html", "A <u>title</u>", VOCABULARY)
    return (run_dir / "out" / "report.html").read_text()


def test_the_values_are_there(run_dir: Path, html: str) -> None:
    page = Page(html)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["phase"] == "evaluation"]
    for row in (evaluations[0], evaluations[-1]):
        assert show(row["evaluation/success_mean"]) in page.text
        assert f"[{show(row['evaluation/success_low'])}, {show(row['evaluation/success_high'])}]" in page.text
    run = RunFiles(run_dir)
    for name in CURVES:
        values = [row[name] for row in rows if row["phase"] == "train" and name in row]
        assert [value if math.isfinite(value) else None for value in run.curve(name).y] == values
    recorded = [name for name in CURVES if run.curve(name).y]
    assert page.tags.count("svg") == len(recorded) + 1 and len(recorded) == 12
    assert all(METRICS[name].meaning in page.text for name in recorded)
    assert "256 prompts" in page.text
    assert "name: low_probability p: 0.3" in page.text
    assert "A <u>title</u>" in page.text and "u" not in page.tags, "what comes in is escaped"


def test_nothing_comes_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href")]
    references += re.findall(r"url\((.*?)\)", html)
    identifiers = {value for name, value in page.attributes if name == "id"}
    assert references and {reference[:1] for reference in references} == {"#"}
    assert {reference[1:] for reference in references} <= identifiers
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "http:" not in html and "https:" not in html and "@import" not in html and "default-src 'none'" in html


def test_no_script_runs_but_the_viewers(html: str) -> None:
    """The policy of the page names its only script by its digest."""
    _, script = (text for kind, text in Page(html).texts if kind == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in Page(html).attributes if value.startswith("default-src"))
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_three_responses_are_shown_token_by_token(run_dir: Path, html: str) -> None:
    table = read_rollouts(RunFiles(run_dir).rollouts[-1][1])
    rows, picked = table.to_pylist(), pick_responses(table)
    data = data_of(html)
    assert [each["index"] for each in data["responses"]] == picked and data["first"] == picked[0]
    rewards = [row["reward"] for row in rows]
    assert [rewards[i] for i in picked[:2]] == [max(rewards), min(rewards)] and len(set(picked)) == 3
    for each in data["responses"]:
        row = rows[each["index"]]
        assert texts_of(data, each) == [f" {WORDS[i]}" for i in row["token_ids"]]


def test_the_reliability_table_counts_the_recorded_tokens(run_dir: Path, html: str, tmp_path: Path) -> None:
    rows = read_rollouts(RunFiles(run_dir).rollouts[-1][1]).to_pylist()
    bins: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        for value in row["values"]:
            bins.setdefault(min(max(math.ceil(10 * value) - 1, 0), 9), []).append((value, row["reward"]))
    expected = []
    for k, pairs in sorted(bins.items()):
        means = [show(sum(column) / len(pairs)) for column in zip(*pairs, strict=True)]
        place = "up to 0.100" if k == 0 else "above 0.900" if k == 9 else f"{show(k / 10)} to {show((k + 1) / 10)}"
        expected.append((place, f"{len(pairs):,}", *means))
    assert reliability_table(RunFiles(run_dir)) == expected and len(expected) > 2
    page = Page(html)
    assert "Calibration of the values" in page.text
    assert all(" ".join(row) in page.text for row in expected)
    write_sample_run(tmp_path, num_steps=1, num_prompts=1)
    ((_, file),) = RunFiles(tmp_path).rollouts
    pq.write_table(pq.read_table(file).drop_columns("returns"), file)
    assert reliability_table(RunFiles(tmp_path)) == [], "a recording of an earlier version"


def test_a_bare_run_still_gives_a_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        write_report(tmp_path, tmp_path / "report.html", "none", VOCABULARY)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step"):
        write_report(tmp_path, tmp_path / "report.html", "none", VOCABULARY)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "phase": "train", "time": 1.0, "rollout/reward_mean": 0.25, "critic/explained_variance": null}\n'
    )
    write_report(tmp_path, tmp_path / "report.html", "one step", VOCABULARY)
    page = Page((tmp_path / "report.html").read_text())
    assert "Mean training reward: 0.250 at the start, 0.250 at the end." in page.text
    assert "Explained variance" not in page.text, "a curve of nan alone is no curve"


def test_several_data_sets_and_samples_have_curves_of_their_own(tmp_path: Path) -> None:
    write_sample_run(tmp_path, num_steps=1, num_prompts=1)
    file = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in (row for row in rows if row["phase"] == "evaluation"):
        for what, mean in {"math <5>/success": 0.125, "hub/code/success": 0.625, "pass_at_n": 0.875}.items():
            ends = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
            row |= {f"evaluation/{what}_{end}": value + row["step"] / 100 for end, value in ends.items()}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunFiles(tmp_path)
    assert run.data_sets == ["math <5>", "hub/code"]
    charts = heldout_parts(run)
    assert [chart.title for chart in charts] == ["math <5>", "hub/code", "Held-out pass@n"]
    write_report(tmp_path, tmp_path / "report.html", "two", VOCABULARY)
    page = Page((tmp_path / "report.html").read_text())
    assert run.curve("evaluation/math <5>/success_mean").y == [0.125, 0.135]
    curve = run.curve("evaluation/pass_at_n_mean")
    assert curve.y[1] == 0.885 and (curve.low[1], curve.high[1]) == pytest.approx((0.785, 0.985))
    assert "math <5>" in page.text and "hub/code" in page.text and "Held-out pass@n" in page.text
    assert "Bands: 95 % bootstrap intervals" in page.text and "n is 2" in page.text


def test_one_data_set_has_no_section_of_its_own(html: str) -> None:
    assert "Held-out prompts" not in Page(html).text


@pytest.mark.parametrize(("low", "words"), [(0.3, "The policy learns"), (0.2, "No clear change"), (-1.0, "fell")])
def test_it_claims_no_more_than_the_intervals(tmp_path: Path, low: float, words: str) -> None:
    write_sample_run(tmp_path, num_steps=1, num_prompts=1)
    file = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first, last = (row for row in rows if row["phase"] == "evaluation")
    first |= {"evaluation/success_mean": 0.2, "evaluation/success_low": 0.1, "evaluation/success_high": 0.25}
    last |= {
        "evaluation/success_mean": low + 0.1,
        "evaluation/success_low": low,
        "evaluation/success_high": low + 0.2,
    }
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(tmp_path, tmp_path / "report.html", "claims", VOCABULARY)
    assert words in Page((tmp_path / "report.html").read_text()).text


def test_final_table(run_dir: Path) -> None:
    console = Console(width=120, record=True, file=(run_dir / "console").open("w"))
    console.print(final_table(run_dir))
    text = console.export_text()
    last = RunFiles(run_dir).evaluations[-1]
    for wanted in (
        "held-out success",
        f"{show(last['evaluation/success_mean'])} [{show(last['evaluation/success_low'])}, ",
        "training reward",
        "segments per response",
        "seconds per step",
        "response length",
    ):
        assert wanted in text
