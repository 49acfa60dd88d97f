"""The command lines that cut a program off from the machine, with bubblewrap or with unshare.

Both make namespaces for processes, network, files and shared memory, and show the program nothing but the system, this
Python, and an empty /tmp in memory. If root starts it, the program runs as a user without rights.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_rl.sandbox.inside import PROGRAM, SCRATCH

Isolation = Literal["bubblewrap", "unshare"]
INSIDE = Path(__file__).with_name("inside.py")
# What Python and the tools that start it read.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("null", "zero", "full", "random", "urandom")
FIRST_USER, NUM_USERS = 61000, 4000  # user ids that no system gives out; the kernel counts processes by user
DROP_RIGHTS = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of all processes of one program together, except for ``time_s`` and ``output_kb``."""

    time_s: float = 5.0  # wall-clock time for one input
    memory_mb: int = 512  # resident memory; a page that two processes share counts twice
    num_processes: int = 16  # processes and threads
    files_mb: int = 16  # in /tmp, the only folder that a program can write to
    num_files: int = 4096  # files and folders in /tmp
    output_kb: int = 1024  # on stdout, for one input


def command(isolation: Isolation, folder: Path, arguments: Sequence[str], limits: Limits) -> list[str]:
    """The command line that starts ``inside.py arguments`` in a sandbox.

    Args:
        folder: holds inside.py and the program, and is for this run alone.
    """
    run = [os.path.realpath(sys.executable), "-I", "-B", f"/{INSIDE.name}", *arguments]
    return (_bubblewrap if isolation == "bubblewrap" else _unshare)(folder, run, limits)


def _bubblewrap(folder: Path, run: Sequence[str], limits: Limits) -> list[str]:
    mounts: list[str] = []
    for parent in ("/dev", "/etc"):  # bubblewrap makes folders for single files, and closes them to other users
        mounts += ["--perms", "0755", "--dir", parent]
    for path in _visible():
        mounts += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for device in DEVICES:
        mounts += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for target, path in _own_files(folder).items():
        mounts += ["--ro-bind", path, target]
    mounts += ["--size", str(limits.files_mb * 2**20), "--perms", "1777", "--tmpfs", SCRATCH, "--remount-ro", "/"]
    start = ["bwrap", "--die-with-parent", "--new-session", "--chdir", SCRATCH, *mounts]
    start += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() != 0:  # bubblewrap leaves the program no capability
        return [*start, "--unshare-user", "--", *run]
    for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
        start += ["--cap-add", capability]
    return [*start, "--", *DROP_RIGHTS, *_as_nobody(), *run]


def _unshare(folder: Path, run: Sequence[str], limits: Limits) -> list[str]:
    namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
    if os.geteuid() != 0:
        namespaces = ["--user", "--map-root-user", *namespaces]
    script = _mount_and_run(folder, run, limits)
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "sh", "-c", script]


def _mount_and_run(folder: Path, run: Sequence[str], limits: Limits) -> str:
    """A shell script for the first process of new namespaces: mounts what the program may see, and starts it there.

    The shell stays that first process: when it ends, the kernel kills all others.
    """
    root = folder / "root"
    root.mkdir()
    shown = [path for path in _visible() if not os.path.islink(path)]
    links = {path[1:]: os.readlink(path) for path in _visible() if os.path.islink(path)}
    binds = {path: path for path in shown} | _own_files(folder)
    mounts = [f"{path} {root}{target} none rbind,ro,nosuid,nodev" for target, path in binds.items()]
    mounts += [f"/dev/{name} {root}/dev/{name} none bind,nosuid,noexec" for name in DEVICES]
    size = f"size={limits.files_mb}m,nr_inodes={limits.num_files}"
    mounts += [f"none {root}{SCRATCH} tmpfs {size},mode=1777,nosuid,nodev"]
    (folder / "fstab").write_text("\n".join([*(line.replace("\\", "\\134") for line in mounts), ""]))
    folders = ["dev", SCRATCH[1:], *(target[1:] for target, path in binds.items() if os.path.isdir(path))]
    files = [*(target[1:] for target, path in binds.items() if not os.path.isdir(path)), *(f"dev/{d}" for d in DEVICES)]
    parents = [parent for file in files if (parent := os.path.dirname(file))]
    commands = [
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=755,nosuid,nodev", "none", str(root)],
        ["cd", str(root)],
        ["mkdir", "-p", *folders, *parents],
        ["touch", *files],
        *(["ln", "-s", to, link] for link, to in links.items()),
        ["mount", "--all", "--fstab", str(folder / "fstab")],
        ["mount", "-o", "remount,bind,ro,nosuid,nodev", str(root)],
        ["chroot", ".", *DROP_RIGHTS, "--securebits=+noroot,+noroot_locked", *_as_nobody(), *run],
    ]
    return " && ".join(map(shlex.join, commands)) + "; exit $?"  # the shell has more to do, so it stays


def _visible() -> list[str]:
    """Paths of the system that exist here, and the folder in which this Python is installed."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = [path for path in SYSTEM if os.path.lexists(path)]
    return paths if prefix == "/usr" or prefix.startswith("/usr/") else [*paths, prefix]


def _own_files(folder: Path) -> dict[str, str]:
    """Where the sandbox shows the files of this run, and where they are."""
    return {name: f"{folder}{name}" for name in (PROGRAM, f"/{INSIDE.name}")}


def _as_nobody() -> list[str]:
    """Options of setpriv: if root starts the program, it becomes a user without rights, another one for each process."""
    if os.geteuid() != 0:
        return []
    user = FIRST_USER + os.getpid() % NUM_USERS
    return [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
