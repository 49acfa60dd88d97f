import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_rl.sft import IGNORED, Demonstrations, ModelShape, WarmStart, batches, padded, warm_start
from sae_rl.tasks.level import Level

TASK = Level(num_steps=2, need=1)
SHAPE = ModelShape(hidden_size=32, num_heads=1, intermediate_size=64)
SETTINGS = WarmStart(steps=60, batch_size=8, warmup_steps=5, lr=1e-2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], list[tuple[int, float]]]:
    folder = tmp_path_factory.mktemp("models") / "base"
    reports: list[tuple[int, float]] = []
    losses = warm_start(str(folder), TASK, None, SETTINGS, SHAPE, lambda step, loss: reports.append((step, loss)))
    return folder, losses, reports


def test_loss_falls_and_progress_is_reported(trained: tuple) -> None:
    _, losses, reports = trained
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert reports == [(i + 1, loss) for i, loss in enumerate(losses)]


def test_same_seed_gives_the_same_weights(trained: tuple, tmp_path: Path) -> None:
    warm_start(str(tmp_path / "again"), TASK, None, SETTINGS, SHAPE)
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
    warm_start(str(tmp_path / "base"), TASK, None, WarmStart(steps=2, batch_size=2), SHAPE)
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(kept[0](input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_fine_tunes_a_saved_model_on_a_file(trained: tuple, tmp_path: Path) -> None:
    problem = TASK.problem(0, "train", 0)
    row = {"prompt": problem.prompt, "response": "A+1 A+3 A+5"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    settings = WarmStart(steps=25, batch_size=2, lr=1e-2, warmup_steps=0)
    losses = warm_start(str(tmp_path / "tuned"), str(tmp_path / "rows.jsonl"), str(trained[0]), settings)
    assert losses[-1] < 0.1 < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    ids = torch.tensor([tokenizer(problem.prompt)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == "A+1 A+3 A+5"


def test_padding_changes_neither_labels_nor_loss(trained: tuple) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    model = AutoModelForCausalLM.from_pretrained(trained[0])
    examples = Demonstrations(TASK, tokenizer, 4, seed=0)
    ids, labels = padded(list(examples), tokenizer.eos_token_id)
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
    stream = batches(examples, WarmStart(batch_size=2))
    shown = [prompt[0] for _ in range(32) for prompt, _ in next(stream)]
    assert sorted(shown) == list(range(64))


def test_errors(trained: tuple, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "I0", "response": 3}\n{"prompt": "I0", "respons": "A+1"}\n')
    quick = WarmStart(steps=1)
    new = str(tmp_path / "new")
    with pytest.raises(ValueError, match="exists already"):
        warm_start(str(trained[0]), TASK, None, quick)
    with pytest.raises(ValueError, match="not a local folder"):
        warm_start(new, TASK, "no/such/model", quick)
    with pytest.raises(ValueError, match="base_model is missing"):
        warm_start(new, str(rows), None, quick)
    with pytest.raises(ValueError, match=r"2 of 2 rows are broken\n  line 1: 'response' must be text"):
        warm_start(new, str(rows), str(trained[0]), quick)
    rows.write_text(json.dumps({"prompt": "I0", "response": "A+1 " * 2000}))
    with pytest.raises(ValueError, match="1 of 1 examples exceed the model's context of 1024 tokens"):
        warm_start(new, str(rows), str(trained[0]), quick)
    assert not Path(new).exists()
    for make, message in (
        (lambda: WarmStart(steps=0), "WarmStart.steps = 0"),
        (lambda: WarmStart(lr=0.0), "WarmStart.lr = 0.0"),
        (lambda: ModelShape(hidden_size=65), "ModelShape.hidden_size = 65"),
        (lambda: ModelShape(architecture="gpt5"), "ModelShape.architecture = 'gpt5'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            make()
