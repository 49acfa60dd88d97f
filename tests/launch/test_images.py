"""Checks of docker/ that need no image, and the licence."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
# SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt, which begins with an empty line; LICENSE leaves that out.
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def instructions(file: Path) -> list[str]:
    """The instructions of a Dockerfile, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def copied(file: Path) -> list[str]:
    """The paths that a Dockerfile copies from the build context."""
    copies = [line.split()[1:] for line in instructions(file) if line.startswith("COPY ")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def test_there_is_one_image_for_each_lock() -> None:
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]
    for file in DOCKERFILES:
        assert f"locks/{file.suffix[1:]}.txt" in copied(file)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_is_copied_exists_and_is_in_the_build_context(file: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in copied(file):
        assert (ROOT / source).exists(), source
        assert source in kept, f"{source} is not in .dockerignore's list"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_pinned_installs_a_lock_and_has_a_user(file: Path) -> None:
    lines = instructions(file)
    for base in re.findall(r"(?:^FROM |--from=)(\S+)", "\n".join(lines), re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+", base), base
    installs = [line for line in lines if re.search(r"\bpip install\b", line)]
    assert installs and all("pip install --no-deps" in line for line in installs)
    assert lines[-3:] == ["USER $USER_ID", "WORKDIR /work", 'ENTRYPOINT ["sae-rl"]']


def test_one_version_of_torch_everywhere() -> None:
    version = re.search(r"^torch==(\S+)$", (ROOT / "locks/gpu.txt").read_text(), re.MULTILINE)
    assert version
    assert f"ARG TORCH_VERSION={version[1]}\n" in (ROOT / "docker/Dockerfile.cpu").read_text()
    assert not re.search(r"^torch==", (ROOT / "locks/cpu.txt").read_text(), re.MULTILINE)


def test_what_an_image_copies_is_enough_to_install(tmp_path: Path) -> None:
    context = tmp_path / "context"
    for source in copied(DOCKERFILES[0]):
        target = context / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(tmp_path), str(context)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sae_rl/cli.py", "sae_rl/conf/train.yaml", "sae_rl/conf/experiment/paper_8b.yaml"} <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_licence_is_apache_2_0_word_for_word() -> None:
    assert hashlib.sha256(b"\n" + (ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0
