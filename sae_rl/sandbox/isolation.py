"""How a program is cut off from the machine: namespaces by bubblewrap or unshare where they may be made, or limits alone."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sae_rl.sandbox.inside import LANDLOCK_CREATE_RULESET, LANDLOCK_VERSION
from sae_rl.sandbox.limits import Limits
from sae_rl.sandbox.system_calls import filter_here

How = Literal["bubblewrap", "unshare", "limits"]
Asked = How | Literal["auto"]
INSIDE = Path(__file__).with_name("inside.py")
PROGRAM = "program.py"
PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")
CHOSEN: dict[Asked, Isolation] = {}  # of this process, or of the one that it checks for
# What Python and the tools that start it need to see.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("null", "zero", "full", "random", "urandom")
FIRST_USER, NUM_USERS = 61000, 4000  # ids that no system gives out; each process that checks takes one
PROBE_S = 10.0


@dataclass(frozen=True, slots=True)
class Isolation:
    """One way to start a program."""

    how: How
    as_root: bool  # started by root, who can become somebody without rights
    why_not_more: str = ""  # what stronger ones said

    def warnings(self) -> list[str]:
        """What is not cut off."""
        if self.how != "limits":
            return []
        open_ways = []
        if not has_landlock() and self.as_root:
            open_ways += ["read every file that is readable for all, data sets with answers among them"]
            open_ways += ["write wherever everybody may write"]
        elif not has_landlock():
            open_ways += [
                "read and write every file of the user who runs this, data sets with answers and keys among them"
            ]
            open_ways += ["read and write the memory of that user's processes, this one among them"]
        if filter_here() is None:
            open_ways += ["use the network", "signal and read other processes of their user"]
            open_ways += ["change modes and times of their user's files"]
        held = "limits" + (" and Landlock" if has_landlock() else "") + (" and seccomp" if filter_here() else "")
        can = f" They can {', '.join(open_ways)}." if open_ways else ""
        why = self.why_not_more or "others were not asked for"
        return [
            f"code sandbox: model-written programs have no namespaces of their own here, only {held} hold them.{can} "
            f"Install bubblewrap, or allow user namespaces ({why})"
        ]

    def command(self, folder: Path, arguments: Sequence[str], limits: Limits) -> list[str]:
        """Starts ``inside.py arguments`` in the sandbox.

        Args:
            folder: this run's own, with inside.py and the program.

        Raises:
            OSError: no Python can be run by somebody without rights.
        """
        run = [self._python(), "-I", "-B", self.path(folder, INSIDE.name), *arguments]
        user = user_id() if self.as_root else 0
        if self.how == "bubblewrap":
            return _bubblewrap(folder, limits, user, run)
        if self.how == "unshare":
            namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
            if not self.as_root:
                namespaces = ["--user", "--map-root-user", *namespaces]
            return [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                *namespaces,
                *_first_process(folder, limits, user, run),
            ]
        return ["setpriv", *_ids(user), "--pdeathsig", "KILL", "--no-new-privs", *run]

    def _python(self) -> str:
        """The one that runs here; where its folder is closed to others and cannot be shown to them, the system's."""
        here = os.path.realpath(sys.executable)
        if self.how != "limits" or not self.as_root:
            return here
        for python in (here, *map(os.path.realpath, PYTHONS)):
            if is_open(Path(python)):
                return python
        raise OSError(f"no Python that other users may run: {here} is in a folder that is closed to them")

    def readable(self, folder: Path) -> list[str]:
        """What Landlock leaves where there is no file system of its own; empty: everything."""
        if self.how != "limits":
            return []
        prefix = str(Path(self._python()).parents[1])
        return [*dict.fromkeys([*(path for path in SYSTEM if os.path.exists(path)), prefix]), str(folder)]

    def writable(self, scratch: str) -> list[str]:
        return [scratch, "/dev/null"] if self.how == "limits" else []

    def path(self, folder: Path, name: str) -> str:
        """Where the program finds a file of the folder."""
        return str(folder / name) if self.how == "limits" else f"/{name}"


def has_landlock() -> bool:
    """Whether the kernel can restrict which files a program sees."""
    return bool(ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION) >= 1)


def open_folder() -> str:
    """For temporary files, which the users that root runs programs as must be able to reach."""
    usual = tempfile.gettempdir()
    if os.geteuid() != 0:
        return usual
    return next((folder for folder in (usual, "/tmp", "/var/tmp") if is_open(Path(folder))), usual)


def is_open(path: Path) -> bool:
    """Whether everybody may pass through these folders, or run this program."""
    return path.exists() and all(each.stat().st_mode & 1 for each in (path, *path.absolute().parents))


def user_id() -> int:
    return FIRST_USER + os.getpid() % NUM_USERS


def _visible() -> list[str]:
    """What exists of the system, and where this Python is installed."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = [path for path in SYSTEM if os.path.lexists(path)]
    return paths if prefix == "/usr" or prefix.startswith("/usr/") else [*paths, prefix]


def _first_process(folder: Path, limits: Limits, user: int, run: Sequence[str]) -> list[str]:
    """Of new namespaces: makes a file system of nothing but what a program needs, and starts it there without rights.

    It stays the first process, whose end is that of all others, and keeps the signal that its parent's death sends.
    """
    root = folder / "root"
    shown = [path for path in _visible() if not os.path.islink(path)]
    binds = {path: path for path in shown} | {f"/{name}": str(folder / name) for name in (PROGRAM, INSIDE.name)}
    mounts = [f"{path} {root}{target} none rbind,ro,nosuid,nodev" for target, path in binds.items()]
    mounts += [f"/dev/{name} {root}/dev/{name} none bind,nosuid,noexec" for name in DEVICES]
    mounts += [f"none {root}/tmp tmpfs size={limits.files_mb}m,nr_inodes={limits.num_files},mode=1777,nosuid,nodev"]
    (folder / "fstab").write_text("\n".join([*(line.replace("\\", "\\134") for line in mounts), ""]))
    root.mkdir(exist_ok=True)
    folders = ["dev", "tmp", *(target[1:] for target, path in binds.items() if os.path.isdir(path))]
    files = [*(target[1:] for target, path in binds.items() if not os.path.isdir(path)), *(f"dev/{d}" for d in DEVICES)]
    parents = [parent for file in files if (parent := os.path.dirname(file))]
    links = {path[1:]: os.readlink(path) for path in _visible() if os.path.islink(path)}
    drop = ["setpriv", *_ids(user), "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    script = [
        "set -e",
        shlex.join(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755,nosuid,nodev", "none", str(root)]),
        shlex.join(["cd", str(root)]),
        shlex.join(["mkdir", "-p", *folders, *parents]),
        *(f": > {shlex.quote(file)}" for file in files),
        *(shlex.join(["ln", "-s", to, link]) for link, to in links.items()),
        shlex.join(["mount", "--all", "--fstab", str(folder / "fstab")]),
        shlex.join(["mount", "-o", "remount,bind,ro,nosuid,nodev", str(root)]),
        shlex.join(["chroot", ".", *drop, "--securebits=+noroot,+noroot_locked", *run]),  # not exec: see above
    ]
    return ["sh", "-c", "\n".join(script)]


def _ids(user: int) -> list[str]:
    return [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []


def _bubblewrap(folder: Path, limits: Limits, user: int, run: Sequence[str]) -> list[str]:
    shown: list[str] = []
    for path in _visible():
        shown += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for device in DEVICES:
        shown += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for name in (PROGRAM, INSIDE.name):
        shown += ["--ro-bind", str(folder / name), f"/{name}"]
    shown += ["--size", str(limits.files_mb * 2**20), "--perms", "1777", "--tmpfs", "/tmp", "--remount-ro", "/"]
    command = ["bwrap", "--die-with-parent", "--new-session", "--chdir", "/tmp", *shown]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    drop = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    if user:
        command += [part for name in ("SETUID", "SETGID", "SETPCAP") for part in ("--cap-add", f"CAP_{name}")]
        drop += _ids(user)
    else:
        command += ["--unshare-user"]
        drop = []  # bubblewrap leaves no capability
    return [*command, "--", *drop, *run]


def chosen(how: Asked) -> Isolation:
    """The strongest isolation that works here, or the one that is asked for; it has been tried once.

    Raises:
        OSError: it does not work, or none does.
    """
    if how not in CHOSEN:
        CHOSEN[how] = _choose(how)
    return CHOSEN[how]


def _choose(how: Asked) -> Isolation:
    refused: list[str] = []
    for isolation in candidates(os.geteuid() == 0):
        if how in ("auto", isolation.how):
            if (problem := probe(isolation)) is None:
                return replace(isolation, why_not_more="; ".join(refused))
            refused.append(f"{isolation.how}: {problem}")
    raise OSError(f"the code sandbox cannot run here ({'; '.join(refused)})")


def candidates(as_root: bool) -> list[Isolation]:
    return [Isolation("bubblewrap", as_root), Isolation("unshare", as_root), Isolation("limits", as_root)]


def probe(isolation: Isolation) -> str | None:
    """What is said against it; None: a program ran in it."""
    from sae_rl.sandbox.programs import Sandbox

    tool = {"bubblewrap": "bwrap", "unshare": "unshare", "limits": "setpriv"}[isolation.how]
    if shutil.which(tool) is None:
        return f"{tool} is not installed"
    try:
        with Sandbox("print(6 * 7)", Limits(time_s=PROBE_S), isolation) as sandbox:
            ended = sandbox.run([""], PROBE_S)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if [answer["stdout"] for answer in ended.answers] == ["42\n"]:
        return None
    return (ended.stderr.strip().splitlines() or [ended.ending])[-1]
