"""The files of an evaluation, read back by json, pyarrow and an HTML parser."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from sae_rl.analysis import samples_page
from sae_rl.analysis.evaluation_table import console_tables, print_evaluation, rows_of
from sae_rl.analysis.samples_page import size_of, within_limits, write_samples_page
from sae_rl.evaluation.evaluate import Evaluation
from sae_rl.evaluation.files import model_name, publish, unpublished, versions, write_evaluation
from sae_rl.records.metrics import show
from sae_rl.records.samples import write_samples
from sae_rl.rewards.verdict import Verdict
from tests.records.test_report import Page

from .made_up import NASTY, decode, made_up, make_config, outcome_of


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return made_up(make_config(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def folder(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_evaluation(folder, make_config(folder), evaluation, seconds=12.5)
    write_samples_page(folder, decode)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    return summary


def test_the_summary_has_every_number_and_where_it_comes_from(folder: Path, evaluation: Evaluation) -> None:
    summary = summary_of(folder)
    assert summary["model"] == "nobody/nothing" and summary["seconds"] == 12.5
    assert (summary["samples_per_prompt"], summary["pass_score"]) == (4, 1.0)
    assert summary["data_sets"].keys() == {"sums", "hub/tales"}
    for found, expected in (
        (summary["all"], evaluation.overall),
        (summary["data_sets"]["sums"], evaluation.by_data_set["sums"]),
    ):
        assert found["success"] == {
            "value": expected.success.value,
            "low": expected.success.low,
            "high": expected.success.high,
        }
        assert found["pass_at"]["2"]["value"] == expected.pass_at[2].value
        assert expected.segments is not None and expected.maj_at_n is not None
        assert found["maj_at_n"] == asdict(expected.maj_at_n)
        assert found["segments"]["tokens_mean"] == expected.segments["tokens_mean"]
    assert summary["data_sets"]["hub/tales"]["maj_at_n"] is None
    assert summary["config"]["evaluation"]["samples_per_prompt"] == 4
    assert summary["config"]["algorithm"]["segmenter"]["p"] == 0.2
    assert summary["versions"] == versions() and {"python", "torch", "transformers"} <= versions().keys()


def test_the_samples_are_rows(folder: Path, evaluation: Evaluation) -> None:
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert len(rows) == len(evaluation.rollouts) and evaluation.opens is not None
    for row, rollout, opens in zip(rows, evaluation.rollouts, evaluation.opens, strict=True):
        outcome = outcome_of(rollout)
        assert (row["data_set"], row["prompt_id"], row["sample"]) == (
            rollout.prompt.task,
            rollout.prompt.id,
            rollout.sample,
        )
        assert (row["prompt"], row["answer"], row["response"]) == (
            rollout.prompt.text,
            rollout.prompt.answer,
            rollout.text,
        )
        judged = isinstance(outcome, Verdict)
        assert (row["reward"], row["why"]) == (outcome.score if isinstance(outcome, Verdict) else 0.0, outcome.why)
        assert row["extracted_answer"] == (outcome.answer if isinstance(outcome, Verdict) else None)
        assert (row["failed"], row["finish_reason"]) == (not judged, rollout.finish_reason)
        assert row["num_tokens"] == len(row["token_ids"]) == rollout.token_ids.numel()
        assert row["rollout_logprobs"] == rollout.rollout_logprobs.tolist() and row["opens"] == opens.tolist()
    assert {row["failed"] for row in rows} == {row["finish_reason"] == "stop" for row in rows} == {True, False}


def test_samples_without_segments(tmp_path: Path, evaluation: Evaluation) -> None:
    file = write_samples(tmp_path / "deep" / "samples.parquet", evaluation.rollouts, evaluation.rewards, None)
    assert set(pq.read_table(file, columns=["opens"])["opens"].to_pylist()) == {None}


def test_the_page_holds_numbers_and_samples(folder: Path, evaluation: Evaluation) -> None:
    html = (folder / "samples.html").read_text()
    page = Page(html)
    numbers = [data for kind, data in page.texts if kind == "td"]
    for summary in (evaluation.overall, *evaluation.by_data_set.values()):
        assert show(summary.success.value) in numbers and show(summary.pass_at[4].value) in numbers
        assert f"[{show(summary.success.low)}, {show(summary.success.high)}]" in page.text
    assert evaluation.opens is not None
    pieces = [data for kind, data in page.texts if kind == "b"]
    expected = []
    for rollout, opens in zip(evaluation.rollouts, evaluation.opens, strict=True):
        starts = [i for i, opened in enumerate(opens.tolist()) if opened]
        ends = [*starts[1:], len(opens)]
        expected += [decode(rollout.token_ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    legend = ["one ", "after ", "another"]
    assert [piece.strip() for piece in pieces] == [text.strip() for text in [*legend, *expected]]
    for rollout in evaluation.rollouts:
        assert rollout.prompt.id in page.text and outcome_of(rollout).why in page.text
    assert page.tags.count("article") == len(evaluation.rollouts)
    assert page.tags.count("details") == 10 + 1
    classes = [value for name, value in page.attributes if name == "class"]
    failed = sum(not isinstance(outcome_of(r), Verdict) for r in evaluation.rollouts)
    assert sum("failed-sample" in value for value in classes) == failed
    truncated = sum(r.finish_reason == "length" for r in evaluation.rollouts)
    assert sum("truncated-sample" in value for value in classes) == truncated > 0


def test_the_page_runs_nothing_and_loads_nothing(folder: Path) -> None:
    html = (folder / "samples.html").read_text()
    page = Page(html)
    assert NASTY in page.text and NASTY not in html
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert "default-src 'none'" in html and "http://" not in html and "https://" not in html


def test_every_choice_hides_the_samples_that_it_leaves_out(folder: Path) -> None:
    html = (folder / "samples.html").read_text()
    page = Page(html)
    choices = {value for name, value in page.attributes if name == "for"}
    everything = {"kind", "set"}
    assert choices == everything | {"right", "wrong", "failed", "truncated", "set-1", "set-2"}
    assert {found for found in re.findall(r"main:has\(#([\w-]+):checked\)", html)} == choices - everything
    classes = [value for name, value in page.attributes if name == "class" and "question" in value]
    assert [value.split()[-1] for value in classes] == ["of-1"] * 6 + ["of-2"] * 4


def test_a_page_that_would_be_too_large_says_what_is_missing(
    folder: Path, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_evaluation(tmp_path, make_config(tmp_path), evaluation, seconds=1.0)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    prompts = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    size_of_9 = sum(size_of(samples) for samples in prompts if samples[0]["prompt_id"] != "sums-5")
    monkeypatch.setattr(samples_page, "MAX_SIZE", size_of_9)
    page = Page(write_samples_page(tmp_path, decode).read_text())
    assert "The page holds 36 of 40 samples: the first 5 of 6 prompts of sums, all 4 prompts of hub/tales" in page.text
    assert page.tags.count("article") == 36 and "sums-4" in page.text and "sums-5" not in page.text
    assert "The page holds" not in Page((folder / "samples.html").read_text()).text


def test_what_fits_is_taken_from_every_data_set_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_page, "MAX_SIZE", 3 * (30 + samples_page.SIZE_OF_SAMPLE) + 10)
    row = {"response": "x" * 10, "why": "y" * 4, "num_tokens": 2, "prompt": "z" * 8}  # 30 characters, and its markup
    prompts = [[row | {"data_set": name, "prompt_id": i}] for name, count in (("a", 5), ("b", 2)) for i in range(count)]
    shown = [(samples[0]["data_set"], samples[0]["prompt_id"]) for samples in within_limits(prompts)]
    assert shown == [("a", 0), ("a", 1), ("b", 0)]
    large = prompts[0][0] | {"prompt": "z" * 1000}
    assert within_limits([[large]]) == [[large]], "a page without samples would be of no use"


def test_an_evaluation_without_segments_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, "evaluation.top_p=0.9")
    write_evaluation(tmp_path, config, made_up(config), seconds=1.0)
    page = Page(write_samples_page(tmp_path, decode).read_text())
    assert "Segments are not shown: evaluation.top_p = 0.9" in page.text and "segments per response" not in page.text
    print_evaluation(tmp_path, plain=True)
    assert "segments are left out: evaluation.top_p = 0.9" in capsys.readouterr().out


def test_console_tables(folder: Path, evaluation: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(folder, plain=False)
    out = capsys.readouterr().out
    assert "\x1b" not in out, "no terminal"
    assert "all data sets: 10 prompts, 4 samples each" in out and "hub/tales: 4 prompts, 4 samples each" in out
    lines = {" ".join(line.split()) for line in out.splitlines()}
    for name in ("success", "response_tokens"):
        estimate = getattr(evaluation.overall, name)
        label = {"success": "avg@4", "response_tokens": "tokens, mean"}[name]
        assert f"{label} {show(estimate.value)} [{show(estimate.low)}, {show(estimate.high)}]" in lines
    assert str(folder / "samples.html") in lines
    assert len(console_tables(summary_of(folder), plain=True)) == 3


def test_one_data_set_is_one_table_and_what_is_not_known_is_a_dash(tmp_path: Path) -> None:
    summary = summary_of_one(tmp_path)
    assert [table.title for table in console_tables(summary, plain=True)] == ["sums: 1 prompt, 1 sample each"]
    rows = rows_of(summary["all"])
    assert ("-", "") in (rows["tokens, mean of right"], rows["tokens, mean of wrong"])


def summary_of_one(folder: Path) -> dict[str, Any]:
    from .made_up import make_prompts

    config = make_config(folder, "evaluation.samples_per_prompt=1")
    result = made_up(config, make_prompts([("sums", 1)]))
    assert math.isnan(result.overall.right_tokens.value) or math.isnan(result.overall.wrong_tokens.value)
    write_evaluation(folder, config, result, seconds=1.0)
    return summary_of(folder)


def test_no_evaluation_overwrites_another(tmp_path: Path) -> None:
    made = []
    for model in ("/models/base", "/runs/a/checkpoints/step_000020/hf", "Qwen/Qwen3-8B Base", "/models/base"):
        with unpublished(tmp_path) as folder:
            (folder / "summary.json").write_text(model)
            made.append(publish(folder, model))
    assert [path.name for path in made] == ["001_base", "002_step_000020", "003_Qwen3-8B_Base", "004_base"]
    assert [path.parent for path in made] == [tmp_path / "evaluation"] * 4
    assert (made[0] / "summary.json").read_text() == "/models/base"
    with pytest.raises(RuntimeError, match="torn"), unpublished(tmp_path) as folder:
        raise RuntimeError("torn")
    assert sorted((tmp_path / "evaluation").iterdir()) == sorted(made), "what failed leaves nothing"
    assert model_name("/") == "model" and oct(made[0].stat().st_mode)[-3:] == "755"
