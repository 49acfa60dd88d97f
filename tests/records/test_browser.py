"""The pages in a browser: they open from their file without an error, show the first response, and follow the keys."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sae_rl.analysis.report import write_report
from sae_rl.analysis.samples_page import write_samples_page
from sae_rl.analysis.viewer import Vocabulary, chosen, view_of_step, write_page
from sae_rl.config.schema import as_tree
from sae_rl.evaluation.files import write_evaluation
from sae_rl.records.rollouts import read_rollouts, write_rollouts
from tests.evaluation import made_up

from .browser import driven, needs_browser, opened
from .page_data import data_of, numbers_of, texts_of
from .sample_run import SAE_OF_SAMPLES, VOCABULARY, WORDS, make_config, step_record, write_sample_run
from .test_report import Page

pytestmark = [needs_browser, pytest.mark.slow]
HOSTILE = [
    *(
        "</script><script>document.title = 'owned'</script>",
        "<!--<script>",
        "<img src=x onerror=document.title='owned'>",
    ),
    *("\u2028", '" onmouseover="x', "&lt;", "\n", "\t  ", "{{ 7 * 7 }}", ""),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses with hostile texts, in the place of the tokens that most of them begin with."""
    folder = tmp_path_factory.mktemp("step")
    record = step_record(1, 3, 0.5, random.Random(3))
    prompts = [replace(rollout.prompt, text=HOSTILE[0]) for rollout in record.rollouts]
    rollouts = [replace(rollout, prompt=prompt) for rollout, prompt in zip(record.rollouts, prompts, strict=True)]
    record = replace(record, rollouts=rollouts, reasons=[HOSTILE[1]] * len(rollouts))
    table = read_rollouts(write_rollouts(folder, record))
    viewed = view_of_step(table, as_tree(make_config(folder, SAE_OF_SAMPLES)))
    first = sorted({token for rollout in rollouts for token in rollout.token_ids[:40].tolist()})
    names = dict(zip(first, HOSTILE, strict=False))
    vocabulary = Vocabulary(decode=lambda ids: "".join(names.get(i, f" {WORDS[i]}") for i in ids))
    output = folder / "view.html"
    texts = {"title": HOSTILE[0], "source": HOSTILE[2], "config_text": HOSTILE[0]}
    write_page(viewed, chosen(viewed, 64), vocabulary, output, first=2, **texts)
    return output


def tokens_shown(document: str) -> list[str]:
    box = re.search(r'<div class="tokens"[^>]*>(.*?)</div>', document, re.DOTALL)
    assert box is not None
    return [data for kind, data in Page(f"<div>{box[1]}</div>").texts if kind != "div"]


def test_the_viewer_shows_the_first_response_whatever_its_text(page: Path) -> None:
    document, console = opened(page)
    assert console == []
    data = data_of(page.read_text())
    first = next(each for each in data["responses"] if each["index"] == 2)
    texts = texts_of(data, first)
    assert len(set(texts) & set(HOSTILE)) > 3, "hostile texts are in the response"
    shown = [text.replace("\n", "↵\n") or "◌" for text in texts]
    assert tokens_shown(document) == [text for text in shown if text.strip()]
    assert document.count("<script") == page.read_text().count("<script"), "no text became an element"
    assert "<img" not in document


def test_no_other_script_runs(page: Path, tmp_path: Path) -> None:
    """Nor does the browser hide an error from these tests."""
    smuggled = tmp_path / "smuggled.html"
    smuggled.write_text(page.read_text().replace("</body>", "<script>document.body.id = 'owned'</script></body>"))
    document, console = opened(smuggled)
    assert len(console) == 1 and "Content Security Policy" in console[0] and 'id="owned"' not in document


def test_report_and_samples_open_without_an_error(tmp_path: Path) -> None:
    write_sample_run(tmp_path / "run")
    write_report(tmp_path / "run", tmp_path / "report.html", "A report", VOCABULARY)
    document, console = opened(tmp_path / "report.html")
    assert console == []
    data = data_of((tmp_path / "report.html").read_text())
    first = next(each for each in data["responses"] if each["index"] == data["first"])
    assert tokens_shown(document) == texts_of(data, first)
    config = made_up.make_config(tmp_path)
    write_evaluation(tmp_path, config, made_up.made_up(config), seconds=1.0)
    document, console = opened(write_samples_page(tmp_path, made_up.decode))
    assert console == [] and "avg@4" in document


KEYS = """
const part = (name) => document.querySelector(`[data-part="${name}"]`);
const seen = [];
async function press(key, options = {}, target = document.body) {
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, ...options }));
  await new Promise((done) => setTimeout(done, 200));
  const cell = (name) => part("numbers").querySelector(`[data-number="${name}"]`).textContent;
  const index = part("facts").lastElementChild.textContent;
  const place = part("place").textContent.match(/[0-9]+/)[0];
  seen.push([key, index, place, cell("probability"), part("hits").textContent].join(";"));
}
setTimeout(async () => {
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"]) await press(key);
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) await press(key, { shiftKey: true });
  await press("n");
  await press("p");
  part("search").value = "QUERY";
  part("search").dispatchEvent(new Event("input"));
  await press("Enter", {}, part("search"));
  await press("f");
  await press("?");
  document.body.dataset.seen = seen.join("|") + "|" + part("help").open + "|" + part("kind").value;
}, 1000);
"""


def test_the_cursor_follows_the_keys(tmp_path: Path) -> None:
    record = step_record(1, 3, 0.5, random.Random(3))
    viewed = view_of_step(
        read_rollouts(write_rollouts(tmp_path, record)), as_tree(make_config(tmp_path, SAE_OF_SAMPLES))
    )
    write_page(
        viewed, chosen(viewed, 64), VOCABULARY, tmp_path / "view.html", first=2, title="", source="", config_text=""
    )
    data = data_of((tmp_path / "view.html").read_text())
    numbers, texts = numbers_of(data, data["responses"][2]), texts_of(data, data["responses"][2])
    word = next(text for text in texts[20:] if text.startswith(" A"))
    document, console = driven(tmp_path / "view.html", KEYS.replace("QUERY", word.lower()), "#2/5")
    assert console == []
    found = re.search(r'data-seen="([^"]*)"', document)
    assert found is not None, "the keys did something"
    *seen, is_open, kind = found[1].split("|")
    steps = [each.split(";") for each in seen]
    last = len(texts) - 1
    opens = [i for i, weight in enumerate(numbers["the run's own segments"]) if weight]
    places = [6, 7, 6, last, last, 0, opens[1], opens[2], opens[1]]
    assert [int(place) for _, _, place, _, _ in steps[:9]] == places
    order = sorted(data["responses"], key=lambda each: (-each["reward"], each["index"]))
    listed = [each["index"] for each in order]
    assert [int(index) for _, index, *_ in steps[:11]] == [2] * 9 + [listed[(listed.index(2) + 1) % len(listed)], 2]
    hits = [i for i, text in enumerate(texts) if text.startswith(word)]
    key, index, place, probability, count = steps[11]
    assert (key, int(index), int(place), count) == ("Enter", 2, hits[0], f"{len(hits)} in this response")
    expected = 2.718281828 ** numbers["log probability"][hits[0]]
    assert float(probability) == pytest.approx(expected, rel=0.006)
    assert (is_open, kind) == ("true", "right")
