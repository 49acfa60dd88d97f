"""``sae-rl view``: which step and which responses its page shows, and what it says about a mistake."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import yaml

from sae_rl.correlation.files import RESPONSES, TENSORS, save
from sae_rl.records.rollouts import FOLDER, write_rollouts
from tests.conftest import call
from tests.correlation.made_up import made_up_measurements
from tests.records.page_data import data_of
from tests.records.sample_run import write_sample_run
from tests.records.test_viewer import record_like


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_sample_run(folder, num_prompts=3)
    with_model(folder, tiny_model)
    return folder


def with_model(folder: Path, model: Path) -> None:
    file = folder / "config.yaml"
    tree = yaml.safe_load(file.read_text()) if file.exists() else {"name": "measured"}
    file.write_text(yaml.safe_dump(tree | {"model": {"path": str(model)}}))


def test_it_shows_the_last_step_or_another(run: Path, tmp_path: Path) -> None:
    outcome = call("view", str(run))
    page = run / "view_step_000002.html"
    assert (outcome.code, outcome.stdout) == (0, f"{page}\n")
    data = data_of(page.read_text())
    assert len(data["responses"]) == data["total"] == 6 and data["first"] == 0
    other = tmp_path / "other.html"
    assert call("view", str(run), "--step", "1", "--output", str(other)).code == 0
    assert data_of(other.read_text())["responses"][0]["id"] == "level-8/0"


@pytest.mark.parametrize("named", ["level-18/1", "5"])
def test_a_response_is_named_by_its_id_or_its_index(run: Path, tmp_path: Path, named: str) -> None:
    page = tmp_path / "page.html"
    assert call("view", str(run), "--response", named, "--responses", "2", "--output", str(page)).code == 0
    data = data_of(page.read_text())
    assert data["first"] == 5 and [each["id"] for each in data["responses"]] == ["level-18/0", "level-18/1"]
    assert data["total"] == 6


def test_a_correlate_folder(tmp_path: Path, tiny_model: Path) -> None:
    measured = made_up_measurements()
    save(measured, tmp_path)
    written = write_rollouts(tmp_path, record_like(measured.batch))
    written.rename(tmp_path / RESPONSES)
    with_model(tmp_path, tiny_model)
    outcome = call("view", str(tmp_path))
    assert (outcome.code, outcome.stdout) == (0, f"{tmp_path / 'view.html'}\n"), outcome.stderr
    outcome_of_step = call("view", str(tmp_path), "--step", "1")
    assert outcome_of_step.code == 2
    assert (
        outcome_of_step.stderr == f"error: --step 1: {tmp_path} is a folder of sae-rl correlate, which has no steps\n"
    )
    labels = [each["label"] for each in data_of((tmp_path / "view.html").read_text())["columns"]]
    assert {"mean return of 3 continuations", "Monte-Carlo reference of blocks", "sae", "gae"} <= set(labels)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "7"], "--step 7 was not recorded, allowed: 0, 1, 2"),
        (
            ["--response", "nobody/0"],
            "--response nobody/0: the step has the indices 0 to 5, and ids such as level-16/0",
        ),
        (["--response", "6"], "--response 6: the step has the indices 0 to 5, and ids such as level-16/0"),
        (["--responses", "0"], "--responses 0: a page shows at least 1"),
        (["--stepp", "1"], "sae-rl view: unrecognized arguments: --stepp 1"),
        (["--step", "one"], "sae-rl view: argument --step: invalid int value: 'one'"),
    ],
)
def test_a_mistake_is_one_sentence(run: Path, arguments: list[str], said: str) -> None:
    outcome = call("view", str(run), *arguments)
    assert (outcome.code, outcome.stderr) == (2, f"error: {said}\n")


def test_a_folder_without_recordings(tmp_path: Path, tiny_model: Path) -> None:
    assert call("view", str(tmp_path)).stderr == f"error: {tmp_path}: no run wrote into it (no config.yaml)\n"
    with_model(tmp_path, tiny_model)
    outcome = call("view", str(tmp_path))
    assert outcome.stderr == f"error: {tmp_path / FOLDER} holds no recorded step; set logger.rollouts_every_steps\n"
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "step_000000.parquet").write_bytes(b"cut")
    outcome = call("view", str(tmp_path))
    assert outcome.code == 2 and "holds no rollouts that can be read" in outcome.stderr


def test_a_page_in_a_new_folder(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "a" / "b" / "page.html"
    assert call("view", str(run), "--output", str(page)).code == 0 and page.is_file()
    outcome = call("view", str(run), "--output", "/dev/null/page.html")
    assert outcome.code == 2 and outcome.stderr.startswith("error: --output /dev/null/page.html: cannot write there (")


def zeroed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100:400] = bytes(300)
    file.write_bytes(content)


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda file: pq.write_table(change(pq.read_table(file)), file)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("config.yaml", lambda f: f.write_text(""), "FILE cannot be read as a run's configuration (TypeError: "),
        ("config.yaml", lambda f: f.write_text("a: [1"), "FILE cannot be read as a run's configuration (ParserError: "),
        ("config.yaml", lambda f: f.write_text("name: x"), "configuration (KeyError: 'model')"),
        ("rollouts/step_000002.parquet", zeroed, "FILE holds no rollouts that can be read: "),
        (
            "rollouts/step_000002.parquet",
            rewritten(lambda table: table.drop_columns(["answer", "prompt_token_ids"])),
            "FILE lacks the columns prompt_token_ids, answer",
        ),
        ("rollouts/step_000002.parquet", rewritten(lambda table: table.slice(0, 0)), "FILE holds no responses"),
    ],
)
def test_a_damaged_file_is_named(
    run: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    damage(folder / name)
    outcome = call("view", str(folder))
    assert outcome.code == 2 and len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith("error: ") and said.replace("FILE", str(folder / name)) in outcome.stderr


def test_measurements_that_were_cut(tmp_path: Path, tiny_model: Path) -> None:
    measured = made_up_measurements()
    save(measured, tmp_path)
    write_rollouts(tmp_path, record_like(measured.batch)).rename(tmp_path / RESPONSES)
    with_model(tmp_path, tiny_model)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:-9])
    outcome = call("view", str(tmp_path))
    assert outcome.code == 2 and outcome.stderr.startswith(f"error: {tmp_path / TENSORS} cannot be read (")


def test_a_reward_that_is_no_number(run: Path, tmp_path: Path) -> None:
    folder, page = shutil.copytree(run, tmp_path / "run"), tmp_path / "page.html"
    file = folder / FOLDER / "step_000002.parquet"
    table = pq.read_table(file)
    rewards = [math.inf, math.nan, *table["reward"].to_pylist()[2:]]
    pq.write_table(table.set_column(table.column_names.index("reward"), "reward", pa.array(rewards)), file)
    assert call("view", str(folder), "--output", str(page)).code == 0
    responses = data_of(page.read_text())["responses"]
    assert [each["reward"] for each in responses] == [None, None, *rewards[2:]]
    assert [each["right"] for each in responses][:2] == [True, False]
