"""Who may import what, how long files and functions may be, and what importing the pure parts costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sae_rl.types

PACKAGE = Path(sae_rl.types.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(file.relative_to(PACKAGE)) for file in FILES]

HEAVY = {  # library: the only places that import it
    "ray": ["workers/", "integrations/openrlhf.py"],
    "vllm": [
        "backends/engine_process.py",
        "backends/vllm.py",
        "backends/weight_receiver.py",
        "backends/weight_sender.py",
    ],
    "deepspeed": ["backends/deepspeed.py", "backends/sequence_parallel.py"],
    "triton": ["algo/recursion_gpu.py"],  # imported for tensors on a GPU only, where torch brings it along
}
LIGHT = {"torch", "numpy", "numba"}  # beside the standard library
# Part of the package -> the other parts that it may import. `commands`, `cli` and `__main__` put everything together.
MAY_IMPORT = {
    "types": [],
    "garbage": [],
    "digests": [],
    "whole_files": [],
    "seeds": [],
    "plugins": [],
    "names": ["plugins"],
    "settings": ["names", "plugins"],
    "run_lock": ["settings"],
    "knobs": [],
    "sandbox": [],
    "algo": ["knobs", "plugins", "types"],
    "tasks": ["knobs", "names", "plugins", "settings"],
    "reasoning_gym": ["names", "seeds", "settings", "tasks"],
    "rewards": ["knobs", "names", "plugins", "reasoning_gym", "sandbox", "types"],
    "data": ["names", "plugins", "reasoning_gym", "seeds", "settings", "tasks", "types"],
    "config": ["algo", "data", "names", "plugins", "rewards", "settings", "tasks", "types"],
    "protocols": ["digests", "rewards", "types"],
    "checkpoint": ["data", "digests", "protocols"],
    "records": ["algo", "config", "rewards", "types", "whole_files"],
    "run": ["config", "data", "protocols", "records", "rewards", "types"],
    "rollouts": ["algo", "config", "data", "protocols", "records", "rewards", "run", "seeds", "types"],
    "evaluation": ["algo", "config", "plugins", "protocols", "records", "rewards", "rollouts", "types"],
    "correlation": [
        *("algo", "analysis", "config", "evaluation", "names", "protocols", "records"),
        *("rewards", "rollouts", "run", "seeds", "settings", "types", "whole_files"),
    ],
    "critic": ["algo", "config", "protocols", "records", "rollouts", "run", "seeds", "settings", "types"],
    "driver": [
        *("algo", "checkpoint", "critic", "data", "evaluation"),
        *("protocols", "records", "rollouts", "run", "seeds", "types"),
    ],
    "overlapped": ["driver", "records", "rollouts", "run"],
    "replay": ["driver", "records", "rollouts", "run", "settings"],
    "backends": ["algo", "config", "garbage", "types"],
    "workers": ["algo", "backends", "config", "digests", "garbage", "records", "seeds", "settings", "types"],
    "sft": ["knobs", "tasks"],
    "comparison": ["config", "evaluation", "names", "records"],
    "analysis": ["algo", "comparison", "evaluation", "records", "types"],
    "integrations": ["algo", "knobs"],  # and, inside each, the trainer that it is for
}
# Folder -> its layers from the bottom to the top. A file imports files of lower layers only; "*" is every other file.
LAYERS = {
    "algo": [
        *("jit kl", "ragged recursion_cpu whitening_cpu"),
        "corrections loss_mask recursion_gpu segmentation shaping stats",
        *("losses recursion segmenters value_sources", "estimators standalone value_losses"),
    ],
    "analysis": ["pages plots step_columns token_texts", "*", "comparison_page report samples_page"],
    "backends": [
        "engine_process weight_transfer",
        "*",
        "gpu_check sequence_parallel vllm",
        "deepspeed models",
        "memory weight_sender",
    ],
    "commands": [
        "arguments model_files prompts report run_folder warm_start",
        "preflight",
        "assemble",
        "*",
        "demo sweep",
    ],
    "comparison": ["curves", "arms outcomes resampling runs", "selection", "results"],
    "config": ["model search_path", "schema", "checks overrides trial", "compose", "command_line sweeps"],
    "correlation": ["cost measurements settings", "files intervals references", "*", "figures", "tables", "report"],
    "critic": ["*"],
    "data": ["hub sampler", "rows", "columns curriculum mixture", "prompts", "loader task"],
    "data/sources": ["source", "*", "kinds", "mixture"],
    "evaluation": ["segments statistics student", "summary", "evaluate", "files"],
    "integrations": ["hooks", "*"],
    "reasoning_gym": ["lossless_json tasks", "puzzles"],
    "records": ["clock failed_update metrics rollouts", "*", "records"],
    "rewards": ["verdict", "check", "*", "processes table", "pool"],
    "rewards/extraction": ["markup numbers", "final_answer"],
    "rewards/math": ["formulas", "expressions", "answers", "equality", "verifier"],
    "rollouts": ["continuations groups", "branching", "partial step", "sampling_thread"],
    "sandbox": ["inside system_calls", "isolation", "programs", "probe"],
    "tasks": ["task tokenizer", "*", "table"],
    "workers": [
        *("engine_client placement rank_results", "group", "engines rollout shared_folder", "learner nodes"),
        *("critic policy reference rollout_pool weight_check", "table weight_sync", "run_workers", "session"),
    ],
}
EMPTY_NAMES = {"utils", "common", "helpers", "base", "misc", "core"}


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


def imports_of(name: str) -> Iterator[str]:
    """Dotted names of everything that a file imports, at the top or inside a function."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}:{node.lineno}: imports are absolute here"
            is_package = node.module == "sae_rl"
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if is_package else (node.module,)


def modules_of(name: str) -> Iterator[str]:
    """Dotted names of the package's modules that a file imports, also those of ``from package import module``."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(dotted: str) -> str:
    return dotted.removeprefix("sae_rl.").split(".")[0]


def ours(name: str) -> set[str]:
    return {part_of(dotted) for dotted in imports_of(name) if dotted.startswith("sae_rl.")}


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_lives_in_one_place(library: str) -> None:
    users = [name for name in NAMES if library in {dotted.split(".")[0] for dotted in imports_of(name)}]
    assert users, f"nothing imports {library}"
    assert [name for name in users if not any(name.startswith(place) for place in HEAVY[library])] == []


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_it_may(part: str) -> None:
    names = [name for name in NAMES if name == f"{part}.py" or name.startswith(f"{part}/")]
    assert names, f"sae_rl has no {part}"
    for name in names:
        assert ours(name) - {part} <= set(MAY_IMPORT[part]), name


def test_an_integration_needs_nothing_but_its_trainer_and_torch() -> None:
    for name in NAMES:
        if name.startswith("integrations/"):
            trainer = {"openrlhf": {"ray"}, "trl": {"trl"}}.get(Path(name).stem, set())  # OpenRLHF runs on Ray
            top = {dotted.split(".")[0] for dotted in imports_of(name)} - {"sae_rl"}
            assert top - sys.stdlib_module_names <= {"torch"} | trainer, name


def test_algo_and_types_need_nothing_but_torch_numpy_and_numba() -> None:
    for name in NAMES:
        if name == "types.py" or name.startswith("algo/"):
            top = {dotted.split(".")[0] for dotted in imports_of(name)} - {"sae_rl"}
            allowed = {"torch"} if name == "types.py" else LIGHT | ({"triton"} if name in HEAVY["triton"] else set())
            assert top - sys.stdlib_module_names <= allowed, name


@pytest.mark.parametrize("name", ["driver.py", "overlapped.py", "replay.py", "run.py", "checkpoint.py", "protocols.py"])
def test_the_loops_know_no_process_and_no_writer(name: str) -> None:
    assert not ours(name) & {"workers", "backends", "commands", "cli"}
    assert "sae_rl.records.records" not in set(imports_of(name))


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def test_every_folder_has_its_layers() -> None:
    assert set(LAYERS) == {folder_of(name) for name in NAMES} - {""}


@pytest.mark.parametrize("folder", LAYERS)
def test_a_file_imports_only_lower_layers_of_its_folder(folder: str) -> None:
    stems = {Path(name).stem for name in NAMES if folder_of(name) == folder} - {"__init__"}
    named = {stem: height for height, layer in enumerate(LAYERS[folder]) for stem in layer.split() if layer != "*"}
    assert set(named) <= stems, "a layer names a file that is not there"
    assert "*" in LAYERS[folder] or set(named) == stems, "every file has a layer"
    height = {stem: named[stem] if stem in named else LAYERS[folder].index("*") for stem in stems}
    package = f"sae_rl.{folder.replace('/', '.')}."
    for stem in stems:
        below = {
            module.removeprefix(package) for module in modules_of(f"{folder}/{stem}.py") if module.startswith(package)
        }
        assert all(height[other] < height[stem] for other in below if other in height), f"{folder}/{stem}.py"


def test_arrows_never_turn_back() -> None:
    """No cycle among the parts of the package."""
    arrows = {part_of(name.replace("/", ".").removesuffix(".py")): set[str]() for name in NAMES}
    for name in NAMES:
        part = part_of(name.replace("/", ".").removesuffix(".py"))
        arrows[part] |= ours(name) - {part}
    while arrows:
        free = [part for part, targets in arrows.items() if not targets & arrows.keys()]
        assert free, f"a cycle among {sorted(arrows)}"
        for part in free:
            del arrows[part]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_named_after_a_concept_and_fits_400_lines(name: str) -> None:
    assert not EMPTY_NAMES & set(Path(name).with_suffix("").parts)
    assert len((PACKAGE / name).read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", NAMES)
def test_a_function_fits_60_lines(name: str) -> None:
    long = [
        f"{name}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert long == []


def test_the_loop_fits_one_screen() -> None:
    loop = next(n for n in tree_of("driver.py").body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno + 1 <= 40


def default_lookups(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines of ``getattr(config, x, default)`` and ``config.get(x, default)``; a config is what is called one."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3:
            subject: ast.expr = node.args[0]
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 2:
            subject = node.func.value
        else:
            continue
        text = ast.unparse(subject).lower()
        if any(word in text for word in ("config", "cfg", "settings", "options", "knobs")):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("name", NAMES)
def test_a_default_has_one_home(name: str) -> None:
    assert list(default_lookups(tree_of(name))) == []


def test_the_rule_about_defaults_sees_what_it_forbids() -> None:
    bad = "getattr(self.config.a, 'b', 1)\ncfg.get('b', True)\nother.get('b', True)\ngetattr(config, 'b')"
    assert [line for line, _ in default_lookups(ast.parse(bad))] == [1, 2]


FRESH = """
import importlib, sys
for name in {parts}:
    importlib.import_module("sae_rl." + name)
    print(name, *sorted({{"ray", "vllm", "deepspeed"}} & sys.modules.keys()))
"""


def run_python(source: str, code: int = 0) -> list[str]:
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert ended.returncode == code, ended.stderr
    return ended.stdout.splitlines()


def test_pure_parts_leave_heavy_libraries_alone() -> None:
    parts = [
        "types",
        "algo",
        "config.schema",
        "config.compose",
        "data.prompts",
        "rewards.table",
        "rewards.pool",
        "protocols",
        "driver",
    ]
    parts += ["cli", "records.records", "backends.packing"]
    assert run_python(FRESH.format(parts=parts)) == parts


# What takes seconds to import, and what a mistake is told without: in the configuration's keys, and in what they name.
SLOW = {"vllm", "deepspeed", "peft", "datasets", "transformers.models.auto.auto_factory", "torch._dynamo"}
MISTAKE = """
import sys
from sae_rl.cli import main

sys.stderr = sys.stdout
try:
    main()
finally:
    print(*sorted(sys.modules))
"""


FILES_OF_TASK = "task=dapo_math task.max_prompt_tokens=32 task.train.path=none.jsonl task.evaluation.path=none.jsonl"


@pytest.mark.parametrize(
    ("arguments", "said", "unneeded"),
    [
        ("train stepz=1", "error: stepz:", SLOW | {"ray", "transformers"}),
        ("train learner.policy.optimizer.lr=-1", "error: learner.policy.optimizer.lr:", SLOW | {"ray", "transformers"}),
        ("train output_dir=/dev/null/out", "error: output_dir = /dev/null/out:", SLOW),
        ("doctor output_dir=/dev/null/out", "error: output_dir = /dev/null/out:", SLOW),
        ("evaluate output_dir=/dev/null/out", "error: output_dir = /dev/null/out:", SLOW),
        (f"train {FILES_OF_TASK}", "error: task.train: none.jsonl:", SLOW),
    ],
)
def test_a_mistake_is_told_before_slow_imports(arguments: str, said: str, unneeded: set[str], tiny_model: Path) -> None:
    given = [*arguments.split(), f"model.path={tiny_model}", "rollout.max_response_tokens=64"]
    ended = subprocess.run([sys.executable, "-c", MISTAKE, *given], capture_output=True, text=True, timeout=300)
    *message, imported = ended.stdout.splitlines()
    assert ended.returncode == 2 and message[0].startswith(said), ended
    assert unneeded & set(imported.split()) == set()


RARELY = """
import gc
usual = gc.get_threshold()
import sae_rl.workers
print(gc.get_threshold()[0] > 10 * usual[0])
from sae_rl.garbage import collect_as_usual
collect_as_usual()
print(gc.get_threshold() == usual)
"""


def test_a_process_collects_cycles_rarely_until_it_has_started() -> None:
    assert run_python(RARELY) == ["True", "True"]


ONLY_TORCH = """
import sys
from importlib.metadata import packages_distributions, requires
import re

allowed, todo = set(), ["torch", "numpy", "numba", "llvmlite"]
while todo:  # torch's own requirements may be imported too
    name = todo.pop()
    if name not in allowed:
        allowed.add(name)
        needed = [r for r in (requires(name) or []) if "extra ==" not in r]
        todo += [re.match(r"[\\w.-]+", r)[0].lower() for r in needed if not r.lower().startswith("nvidia")]
norm = lambda text: re.sub(r"[-_.]+", "-", text).lower()
allowed = {norm(name) for name in allowed}
modules = {m for m, owners in packages_distributions().items() if {norm(o) for o in owners} & allowed} | {"sae_rl"}


class Gate:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in modules and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"not here: {name}", name=name)


sys.meta_path.insert(0, Gate())
before = set(sys.modules)
import sae_rl.types, sae_rl.algo

for name in ("pydantic", "hydra", "omegaconf", "transformers", "ray", "vllm", "deepspeed", "yaml", "rich", "pyarrow"):
    assert name not in set(sys.modules) - before, name
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
    else:
        assert name in before, f"{name} can be imported, so this proves nothing"
print("ok")

from sae_rl.cli import main

sys.argv, sys.stderr = ["sae-rl", "train"], sys.stdout
main()
"""


def test_the_algorithm_is_imported_where_there_is_only_torch_numpy_and_numba() -> None:
    try:
        ok, message = run_python(ONLY_TORCH, code=2)
        assert ok == "ok"
        assert message.startswith("error: not here: pydantic; the packages of sae-rl train come with the extras")
    except subprocess.TimeoutExpired:
        pytest.fail("importing the algorithm took minutes")
