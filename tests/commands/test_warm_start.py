import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_rl.sft import IGNORED, ModelShape, WarmStart, batches, demonstration, padded, warm_start
from sae_rl.tasks.level import Level

TASK = Level(num_steps=2, need=1)
SHAPE = ModelShape(hidden_size=32, num_attention_heads=1, intermediate_size=64)
SETTINGS = WarmStart(steps=60, batch_size=8, warmup_steps=5, lr=1e-2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], list[int]]:
    folder = tmp_path_factory.mktemp("models") / "base"
    watched: list[int] = []

    def watch(steps: range) -> Iterator[int]:
        for step in steps:
            watched.append(step)
            yield step

    return folder, warm_start(folder, TASK, SETTINGS, SHAPE, watch), watched


def test_loss_falls_and_progress_is_reported(trained: tuple) -> None:
    _, losses, watched = trained
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert watched == list(range(len(losses)))


def test_same_seed_gives_the_same_weights(trained: tuple, tmp_path: Path) -> None:
    warm_start(tmp_path / "again", TASK, SETTINGS, SHAPE)
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (trained[0], tmp_path / "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_folder_is_complete_and_nothing_is_left_beside_it(trained: tuple) -> None:
    folder = trained[0]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_saved_and_loaded_models_have_identical_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def keep(model: torch.nn.Module, *_: object) -> None:
        kept.append(model)
        original(model, *_)

    from sae_rl import sft as module

    original = module.save
    monkeypatch.setattr(module, "save", keep)
    warm_start(tmp_path / "base", TASK, WarmStart(steps=2, batch_size=2), SHAPE)
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(kept[0](input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_padding_changes_neither_labels_nor_loss(trained: tuple) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    model = AutoModelForCausalLM.from_pretrained(trained[0])
    examples = [demonstration(TASK, tokenizer, 0, index) for index in range(4)]
    ids, labels = padded(examples, tokenizer.eos_token_id)
    with torch.no_grad():
        together = model(input_ids=ids).logits.log_softmax(-1)
        for row, (prompt, response) in enumerate(examples):
            alone = model(input_ids=torch.tensor([[*prompt, *response]])).logits.log_softmax(-1)[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)
            kept = labels[row][labels[row] != IGNORED]
            assert kept.tolist() == list(response)
            assert labels[row, : len(prompt)].eq(IGNORED).all()


def test_batches_show_every_example_once_an_epoch() -> None:
    examples = [([i], [i] * (1 + i % 5)) for i in range(64)]
    stream = batches(examples.__getitem__, WarmStart(steps=32, batch_size=2))
    shown = [prompt[0] for _ in range(32) for prompt, _ in next(stream)]
    assert sorted(shown) == list(range(64))


def test_errors(trained: tuple) -> None:
    with pytest.raises(ValueError, match="exists already"):
        warm_start(trained[0], TASK, SETTINGS, SHAPE)
    for make, message in (
        (lambda: WarmStart(steps=0), "WarmStart.steps = 0"),
        (lambda: WarmStart(lr=0.0), "WarmStart.lr = 0.0"),
        (lambda: ModelShape(hidden_size=65), "ModelShape.hidden_size = 65"),
        (lambda: ModelShape(model_type="gpt5"), "ModelShape.model_type = 'gpt5'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            make()
