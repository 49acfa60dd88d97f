"""The table, the Markdown and the page hold the numbers of the comparison, and the page needs no other file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sae_rl.comparison.curves import FIRST_LINE
from sae_rl.records.metrics import METRICS, show
from tests.conftest import Outcome, call
from tests.records.test_report import Page

from .made_up import STEPS, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms of three or four runs, one of which was stopped."""
    folder = tmp_path_factory.mktemp("sweep")
    arms = {"algorithm=sae_short": 0.6, "algorithm=gae": 0.3, "algorithm=monte_carlo": 0.6}
    for algorithm, gain in arms.items():
        for seed in range(4):
            done = 5 if (algorithm, seed) == ("algorithm=gae", 3) else STEPS
            write_run(folder / f"{algorithm},seed={seed}", algorithm, seed=seed, gain=gain, num_prompts=16, done=done)
    (folder / "failed_jobs.txt").write_text(f"algorithm=gae,seed=3: it failed with {NASTY}\n")
    return folder


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("written")
    csv = folder / "csv"
    done = call("compare", str(sweep), "--baseline", "estimator=gae", "--output", str(folder), "--export", str(csv))
    return done, folder


def test_it_writes_everything(written: tuple[Outcome, Path], sweep: Path) -> None:
    done, folder = written
    assert done.code == 0, done.stderr
    for name in ("learning_curve", "final_score", "differences", "tokens", "profile", "critic_explained_variance"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (folder / f"{name}.svg").read_text()
        assert svg.lstrip().startswith("<?xml") and "estimator=" in svg, "a file names its arms"
    found = json.loads((folder / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert [arm["name"] for arm in found["arms"]] == ["estimator=gae", "estimator=monte_carlo", "estimator=sae"]
    assert [len(arm["seeds"]) for arm in found["arms"]] == [3, 4, 4] and found["num_prompts"] == 16
    assert found["arms"][0]["failed"] == [f"{sweep}/algorithm=gae,seed=3: 5 of {STEPS} steps; it failed with {NASTY}"]
    assert [each["verdict"] for each in found["differences"]] == ["better", "better"]
    for text in (
        done.stdout,
        (folder / "comparison.md").read_text(),
        Page((folder / "comparison.html").read_text()).text,
    ):
        words = " ".join(text.split())
        for each in found["differences"]:
            assert each["sentence"] in words
        for arm in found["arms"]:
            assert show(arm["outcomes"]["final"]["value"]) in words
        assert "11 complete runs of 3 arms, 1 incomplete" in words and f"it failed with {NASTY}" in words


def test_the_markdown_has_every_table(written: tuple[Outcome, Path]) -> None:
    lines = (written[1] / "comparison.md").read_text().splitlines()
    titles = [line for line in lines if line.startswith("#")]
    assert titles == [
        "# Comparison",
        *(
            "## Scores",
            "## Speed and stability",
            "## Differences to estimator=gae",
            "## Metrics of training",
            "## Wall time",
        ),
        "## Remarks",
    ]
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert len(widths) == 5 * 2 + 4 * 3 + 2 and widths[0] == widths[1]
    assert any("critic/explained_variance" in line for line in lines)
    assert any(line.startswith("| arm | generate | update | driver | step |") for line in lines)


def test_the_page_needs_no_other_file(written: tuple[Outcome, Path]) -> None:
    html = (written[1] / "comparison.html").read_text()
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href")]
    references += re.findall(r"url\((.*?)\)", html)
    identifiers = {value for name, value in page.attributes if name == "id"}
    assert references and {reference[:1] for reference in references} == {"#"}
    assert {reference[1:] for reference in references} <= identifiers
    assert "http:" not in html and "https:" not in html and "default-src 'none'" in html
    charts = page.tags.count("figure")
    assert page.tags.count("svg") == charts + 2 * 3, "each figure, and two keys of three arms"
    assert METRICS["critic/explained_variance"].meaning in page.text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_a_browser_reports_no_error(written: tuple[Outcome, Path], tmp_path: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    ended = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", (written[1] / "comparison.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "estimator=sae" in ended.stdout and "CONSOLE" not in ended.stderr, ended.stderr


def test_exported_files_give_the_same_comparison(written: tuple[Outcome, Path], tmp_path: Path) -> None:
    csv = written[1] / "csv"
    assert len(list(csv.iterdir())) == 12 and all(file.read_text().startswith(FIRST_LINE) for file in csv.iterdir())
    assert sum(file.stat().st_size for file in csv.iterdir()) < 12 * 6000
    done = call("compare", str(csv), "--baseline", "estimator=gae", "--output", str(tmp_path))
    assert done.code == 0, done.stderr
    before, after = (json.loads((folder / "comparison.json").read_text()) for folder in (written[1], tmp_path))
    for one, other in zip(before["arms"], after["arms"], strict=True):
        assert one["name"] == other["name"] and one["seeds"] == other["seeds"]
        assert one["num_diverged"] == other["num_diverged"] and len(one["failed"]) == len(other["failed"])
        assert one["seconds"] == pytest.approx(other["seconds"], rel=1e-4)
        for part in ("outcomes", "iqm", "diagnostics"):
            for name, estimate in one[part].items():
                known = {key: value for key, value in estimate.items() if value is not None}
                found = {key: value for key, value in other[part][name].items() if value is not None}
                assert found == pytest.approx(known, rel=1e-3, abs=1e-6), name
    assert [each["verdict"] for each in before["differences"]] == [each["verdict"] for each in after["differences"]]


def test_what_never_began_is_exported_too(sweep: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(sweep / "algorithm=gae,seed=0", alone / "seed=0")
    (alone / "failed_jobs.txt").write_text("algorithm=gae,seed=9: refused\n")
    assert call("compare", str(alone), "--output", str(tmp_path / "a"), "--export", str(tmp_path / "csv")).code == 0
    done = call("compare", str(tmp_path / "csv"), "--output", str(tmp_path / "b"))
    assert done.code == 0 and "0 incomplete, 1 not compared" in done.stdout and ": refused." in done.stdout
    assert "One arm: there is nothing to compare it with." in (tmp_path / "b" / "comparison.html").read_text()


def test_curves_of_other_runs_are_not_mixed_with_an_export(sweep: Path, tmp_path: Path) -> None:
    csv, run = tmp_path / "csv", str(sweep / "algorithm=gae,seed=0")
    arguments = ("--output", str(tmp_path / "out"), "--export", str(csv))
    assert call("compare", run, *arguments).code == 0
    (csv / "notes.csv").write_text("a,b\n")
    assert call("compare", run, *arguments).code == 0, "the same run again"
    before = {file: file.read_text() for file in csv.iterdir()}
    done = call("compare", str(sweep / "algorithm=gae,seed=1"), *arguments)
    said = f"--export {csv}: it holds curves of other runs: all_runs_seed=0.csv; remove them or name another"
    assert (done.code, done.stderr) == (2, f"error: {said}\n")
    assert {file: file.read_text() for file in csv.iterdir()} == before


def test_one_run_alone_is_a_page_without_intervals(sweep: Path, tmp_path: Path) -> None:
    done = call("compare", str(sweep / "algorithm=gae,seed=0"), "--output", str(tmp_path))
    assert done.code == 0 and "[" not in done.stdout.split("Means over")[0]
    assert not (tmp_path / "differences.png").exists()


WRONG: dict[str, tuple[list[str], str]] = {
    "no folder": ([], "the following arguments are required: FOLDER"),
    "no such folder": (["nowhere"], "nowhere: there is no such folder or file"),
    "flag": (["SWEEP", "--base", "x", "--outcomes", "y"], "sae-rl compare --help lists the options"),
    "outcome": (["SWEEP", "--outcome", "best"], "argument --outcome: invalid choice: 'best'"),
    "fraction": (["SWEEP", "--last", "0"], "--last takes a fraction above 0 and at most 1, found 0"),
    "key": (["SWEEP", "--arm-by", "algorithm.lam"], "--arm-by algorithm.lam: no run has that key"),
    "baseline": (["SWEEP", "--baseline", "gae"], "--baseline 'gae': no such arm"),
    "output": (["SWEEP", "--output", "/dev/null/out"], "/dev/null/out: cannot write there"),
    "export": (["SWEEP", "--export", "/dev/null/out"], "/dev/null/out: cannot write there"),
    "doubles": (["SWEEP", "--arm-by", "steps"], "two runs of the arm 'all runs' have the seed 0"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_sentence(
    sweep: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("compare", *(str(sweep) if word == "SWEEP" else word for word in arguments))
    assert done.code == 2 and len(done.lines) == 1
    assert done.lines[0].startswith("error: ") and message in done.lines[0]
    assert list(tmp_path.iterdir()) == []


def test_the_help_lists_the_options() -> None:
    done = call("compare", "--help")
    assert done.code == 0
    for flag in ("--baseline", "--arm-by", "--outcome", "--threshold", "--last", "--output", "--export"):
        assert flag in done.stdout
    assert "compare" in call("--help").stdout


def test_arm_by_another_key(sweep: Path, tmp_path: Path) -> None:
    for algorithm, name in (("gae", "one"), ("sae_short", "two")):
        for seed in range(3):
            folder = f"algorithm={algorithm},seed={seed}"
            config = shutil.copytree(sweep / folder, tmp_path / "runs" / folder) / "config.yaml"
            config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"name": name}))
    done = call("compare", str(tmp_path / "runs"), "--arm-by", "name", "--output", str(tmp_path / "out"))
    assert done.code == 0 and "name=two is better than name=one" in " ".join(done.stdout.split())
