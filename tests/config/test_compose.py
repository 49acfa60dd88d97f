"""Every experiment, group option and extension of ``conf/`` becomes a frozen, validated configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from sae_rl.algo import ESTIMATORS, SEGMENTERS
from sae_rl.compose import CONF, check_sweep, load_config, load_evaluation_config
from sae_rl.config import Config, as_tree
from sae_rl.config_checks import check
from sae_rl.errors import ConfigError
from sae_rl.types import Batch, Prompt, Rollout, Scores

from ..conftest import CommandLine

MODEL = ("model.path=nobody/nothing", "model.context_tokens=1024")
HELD_OUT_FILE = "task.evaluation.path=/no/heldout.parquet"
FILES = ("task.train.path=/no/train.parquet", "task.evaluation.path=/no/heldout.parquet")
NEEDED = {  # what an option leaves for the user to say
    "task=dapo_math": ("task.max_prompt_tokens=32", *FILES),
    "task=file": ("task.max_prompt_tokens=32", *FILES),
    "task=verl": ("task.max_prompt_tokens=32", *FILES),
    "task=gsm8k": ("task.max_prompt_tokens=32", *FILES),
    "task=mixture": ("task.train.parts.gsm8k.path=/no/a.jsonl", "task.evaluation.parts.gsm8k.path=/no/b.jsonl"),
    "algorithm=custom": ("algorithm.estimator.name=sae_rl.algo:SAE",),
    "algorithm/segmenter=custom": ("algorithm.segmenter.name=sae_rl.algo:LowProbability",),
    "rollout=paper": ("rollout.max_response_tokens=448", "rollout.kv_cache_gb=1"),
}
PAPER = {"paper_4b": 8, "paper_8b": 16, "paper_14b": 32}

PLUGINS = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from sae_rl.types import Targets


@dataclass(frozen=True)
class EveryOther:
    """Opens at even tokens, or at those that leave ``rest`` when divided by 2."""

    rest: int = 0

    def __post_init__(self):
        if self.rest not in (0, 1):
            raise ValueError(f"EveryOther.rest = {self.rest}, but it must be 0 or 1")

    def __call__(self, batch, scores):
        return (torch.arange(batch.num_tokens) % 2 == self.rest).index_fill(0, batch.offsets[:-1], True)


@dataclass(frozen=True)
class Constant:
    needs_critic: ClassVar[bool] = False
    size: float = 1.0

    def __call__(self, batch, scores, token_rewards, opens):
        return Targets(advantages=torch.full((batch.num_tokens,), self.size), returns=None)


class NotADataclass:
    pass
'''


def group_options() -> list[str]:
    files = [
        file for file in CONF.rglob("*.yaml") if file.parent != CONF and file.parent.name not in ("experiment", "base")
    ]
    return sorted(f"{file.parent.relative_to(CONF)}={file.stem}" for file in files)


@pytest.mark.parametrize("option", group_options())
def test_every_group_option_composes(option: str) -> None:
    config = load_config([option, *MODEL, *NEEDED.get(option, ())])
    assert check(config) == []


@pytest.mark.parametrize(("experiment", "num_gpus"), PAPER.items())
def test_the_papers_experiments(experiment: str, num_gpus: int) -> None:
    config = load_config([f"experiment={experiment}", *FILES])
    assert config.responses_per_step == 512 * 8
    assert config.rollout.max_response_tokens == 8192
    assert config.cluster.rollout.num_workers + config.cluster.policy.num_workers == num_gpus
    tree = as_tree(config)["algorithm"]
    assert tree["segmenter"] == {"name": "low_probability", "p": 0.2, "boundary": "opens"}
    assert tree["estimator"]["name"] == "sae"
    assert not config.algorithm.needs_reference
    assert not config.algorithm.needs_entropies


def test_every_experiment_is_tested_here() -> None:
    assert {file.stem for file in (CONF / "experiment").glob("*.yaml")} == {*PAPER, "demo"}


def test_the_demo_reads_its_model_from_its_own_folder(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base").symlink_to(tiny_model)
    config = load_config(["experiment=demo", f"output_dir={tmp_path}/run"])
    assert Path(config.model.path) == tmp_path / "run" / "base"
    assert config.model.read_context_tokens() == 512


@pytest.mark.parametrize("algorithm", sorted(ESTIMATORS))
@pytest.mark.parametrize("segmenter", sorted(SEGMENTERS))
def test_every_estimator_with_every_segmenter(algorithm: str, segmenter: str) -> None:
    option = f"algorithm/segmenter={segmenter}"
    config = load_config([*MODEL, f"algorithm={algorithm}", option, *NEEDED.get(option, ())])
    assert type(config.algorithm.estimator) is ESTIMATORS[algorithm]
    assert type(config.algorithm.segmenter) is SEGMENTERS[segmenter]


def test_every_member_has_a_file() -> None:
    estimators = {file.stem for file in (CONF / "algorithm").glob("*.yaml")}
    segmenters = {file.stem for file in (CONF / "algorithm/segmenter").glob("*.yaml")}
    assert estimators == {*ESTIMATORS, "sae_short", "dr_grpo", "reinforce_pp_baseline", "custom"}
    assert segmenters == {*SEGMENTERS, "low_probability_short", "custom"}


def test_a_reference_or_no_critic_is_what_the_algorithm_says() -> None:
    assert not load_config([*MODEL, "algorithm=grpo"]).algorithm.needs_critic
    assert load_config([*MODEL, "algorithm.token_rewards.kl_coef=0.01"]).algorithm.needs_reference
    assert load_config([*MODEL, "algorithm.policy_loss.kl_coef=0.01"]).algorithm.needs_reference
    assert load_config([*MODEL, "algorithm.policy_loss.entropy_coef=0.01"]).algorithm.needs_entropies
    for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"):
        assert not load_config([*MODEL, f"algorithm={name}"]).algorithm.needs_critic


def test_entropies_are_computed_where_a_segmenter_reads_them_however_deep() -> None:
    deep = "algorithm.segmenter.segmenter={name: union, members: [{name: random, rate: 0.1}, {name: entropy, threshold: 1}]}"
    for more in (
        ["algorithm/segmenter=entropy"],
        ["algorithm/segmenter=minimum_length", f"~{deep.split('=')[0]}", f"+{deep}"],
    ):
        config = load_config([*MODEL, *more])
        assert config.algorithm.needs_entropies
    inner = as_tree(config)["algorithm"]["segmenter"]["segmenter"]
    assert inner["members"] == [
        {"name": "random", "rate": 0.1, "seed": 0},
        {"name": "entropy", "threshold": 1.0, "opens_fraction": None, "boundary": "opens"},
    ]
    assert not load_config([*MODEL, "algorithm/segmenter=union"]).algorithm.needs_entropies


def sections(config: Config) -> list[tuple[object, str]]:
    return [
        (config, "steps"),
        (config.rollout, "group_size"),
        (config.learner.policy.optimizer, "lr"),
        (config.algorithm, "estimator"),
        (config.algorithm.estimator, "lam"),
        (config.algorithm.segmenter, "p"),
        (config.algorithm.policy_loss, "clip_low"),
    ]


@pytest.mark.parametrize("index", range(7))
def test_a_configuration_is_frozen(index: int) -> None:
    section, name = sections(load_config(MODEL))[index]
    with pytest.raises((ValidationError, AttributeError)):  # FrozenInstanceError is an AttributeError
        setattr(section, name, getattr(section, name))


@pytest.mark.parametrize(
    "overrides",
    [
        MODEL,
        (*MODEL, "algorithm=grpo", "algorithm/segmenter=fixed_length", "logger=off"),
        (*MODEL, "algorithm/segmenter=delimiter", "algorithm.segmenter.token_ids=[1,2]"),
        (*MODEL, "algorithm/segmenter=union"),
        (*MODEL, "algorithm/segmenter=minimum_length"),
        ("experiment=paper_8b", *FILES),
    ],
)
def test_as_tree_is_what_it_was_read_from(overrides: tuple[str, ...]) -> None:
    config = load_config(overrides)
    on_disk = yaml.safe_load(yaml.safe_dump(as_tree(config)))
    assert Config.model_validate(on_disk) == config


def test_an_evaluation_needs_no_training_file() -> None:
    model = ["model.path=nobody/nothing", "model.context_tokens=8192"]
    config = load_evaluation_config([*model, "task=file", HELD_OUT_FILE])
    assert config.task.train == config.task.evaluation and config.task.evaluation.path == "/no/heldout.parquet"
    assert load_evaluation_config([*model, "task=file", *FILES]).task.train.path == "/no/train.parquet"
    assert load_evaluation_config([*model, "task=level"]).task.train.name == "level"
    with pytest.raises(ConfigError, match=r"task\.evaluation\.path has no value"):
        load_evaluation_config([*model, "task=file"])
    with pytest.raises(ConfigError, match=r"task\.train\.path has no value"):
        load_config([*model, "task=file", HELD_OUT_FILE])


def test_overrides_work_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config([*MODEL, "seed=3"]).seed == 3
    assert not list(tmp_path.iterdir())


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_plugins.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)


def two_responses() -> Batch:
    prompt = Prompt(id="a", text="x", token_ids=(1,), answer="y", task="t", reward="exact")
    rollouts = [
        Rollout(
            prompt=prompt,
            sample=i,
            token_ids=torch.arange(3),
            rollout_logprobs=torch.zeros(3),
            text="",
            finish_reason="stop",
            policy_versions=torch.zeros(3, dtype=torch.int64),
            temperature=1.0,
        )
        for i in range(2)
    ]
    return Batch.of(rollouts, [0.0, 1.0])


@pytest.mark.usefixtures("plugins")
def test_a_users_segmenter_and_estimator_by_import_path() -> None:
    config = load_config(
        [
            *MODEL,
            "~algorithm/segmenter",
            "+algorithm.segmenter={name: my_plugins:EveryOther, rest: 1}",
            "~algorithm.estimator",
            "+algorithm.estimator={name: my_plugins:Constant, size: 0.5}",
        ]
    )
    algorithm, batch = config.algorithm, two_responses()
    assert not algorithm.needs_critic
    scores = Scores(old_logprobs=batch.rollout_logprobs, values=None, ref_logprobs=None)
    opens = algorithm.segmenter(batch, scores)
    assert opens.tolist() == [True, True, False, True, False, True]
    targets = algorithm.estimator(batch, scores, algorithm.token_rewards(batch, scores), opens)
    assert targets.advantages.tolist() == [0.5] * 6
    assert as_tree(config)["algorithm"]["segmenter"] == {"name": "my_plugins:EveryOther", "rest": 1}
    assert Config.model_validate(as_tree(config)) == config


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "knobs", "fragments"),
    [
        ("my_plugins:EveryOther", {"rest": 2}, ("rest = 2", "must be 0 or 1")),
        ("my_plugins:EveryOther", {"rest": "odd"}, ("rest", "'odd'", "integer")),
        ("my_plugins:EveryOther", {"rst": 1}, ("no knob 'rst'", "did you mean 'rest'?")),
        ("my_plugins:EvryOther", {}, ("cannot import 'my_plugins:EvryOther'",)),
        ("my_plugin:EveryOther", {}, ("cannot import 'my_plugin:EveryOther'", "No module named")),
        ("my_plugins:NotADataclass", {}, ("not a dataclass",)),
        ("low_probabilty", {}, ("'low_probabilty' is unknown", "did you mean 'low_probability'?")),
    ],
)
def test_a_wrong_plugin_is_named(name: str, knobs: dict[str, object], fragments: tuple[str, ...]) -> None:
    tree = as_tree(load_config(MODEL))
    tree["algorithm"]["segmenter"] = {"name": name, **knobs}
    with pytest.raises(ValidationError) as error:
        Config.model_validate(tree)
    assert error.value.errors()[0]["loc"] == ("algorithm", "segmenter")
    for fragment in fragments:
        assert fragment in str(error.value)


def test_train_print_shows_the_resolved_configuration(sae_rl: CommandLine) -> None:
    shown = sae_rl("train", "--print", *MODEL, "seed=7", "name=mine")
    assert (shown.code, shown.stderr) == (0, "")
    tree = yaml.safe_load(shown.stdout)
    assert (tree["seed"], tree["output_dir"]) == (7, "outputs/mine")
    assert Config.model_validate(tree) == load_config([*MODEL, "seed=7", "name=mine"])


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(
    flag: str, sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configs: list[Config] = []
    monkeypatch.setattr("sae_rl.run.run_training", configs.append)
    swept = sae_rl("train", flag, *MODEL, "algorithm=sae,gae", "seed=0,1", "name=sweep", "steps=3")
    assert (swept.code, swept.stderr) == (0, "")
    found = [(as_tree(config)["algorithm"]["estimator"]["name"], config.seed) for config in configs]
    assert found == [("sae", 0), ("sae", 1), ("gae", 0), ("gae", 1)]
    folders = [config.output_dir for config in configs]
    assert folders == [tmp_path / f"outputs/sweep/algorithm={a},seed={s}" for a in ("sae", "gae") for s in (0, 1)]


def test_a_sweep_of_the_demo_starts_from_its_base_model_and_writes_where_it_is_told(
    sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    configs: list[Config] = []
    monkeypatch.setattr("sae_rl.run.run_training", configs.append)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "base").symlink_to(tiny_model)
    swept = sae_rl("train", "-m", "experiment=demo", "algorithm=glob(*ae)", "output_dir=mine")
    assert (swept.code, swept.stderr) == (0, "")
    folders = [tmp_path / f"mine/algorithm={name}" for name in ("gae", "length_adaptive_gae", "sae")]
    assert [config.output_dir for config in configs] == folders
    assert {config.model.path for config in configs} == {"mine/base"}


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("algorithm=sae,gea", ("algorithm=gea", "did you mean 'gae'?")),
        ("algorithm.estimator.lamb=0.5,0.9", ("algorithm.estimator.lamb", "did you mean 'lam'?")),
        ("algorithm.estimator.lam=0.5,1.5", ("lam = 1.5", "[0, 1]")),
        ("algorithm/segmenter=random,fixd_length", ("fixd_length", "did you mean 'fixed_length'?")),
    ],
)
def test_a_sweep_with_a_mistake_does_not_begin(
    override: str, fragments: tuple[str, ...], sae_rl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Config] = []
    monkeypatch.setattr("sae_rl.run.run_training", runs.append)
    outcome = sae_rl("train", "-m", *MODEL, override)
    assert (outcome.code, runs) == (2, [])
    for fragment in fragments:
        assert fragment in outcome.stderr


def test_check_sweep_takes_a_good_sweep() -> None:
    check_sweep([*MODEL, "algorithm=sae,gae", "rollout.group_size=4,8"])
    with pytest.raises(ConfigError, match="did you mean 'group_size'"):
        check_sweep([*MODEL, "rollout.group_sze=4,8"])
