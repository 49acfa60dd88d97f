"""Hydra with ``conf/`` and the folders of a user's own configurations on its search path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path

from sae_rl.settings import ConfigError

# A wheel has conf/ inside the package, a checkout has it beside the package.
CONF = next(folder / "conf" for folder in Path(__file__).parents[1:3] if (folder / "conf").is_dir())
# A folder named base holds what the options of its group share, and is no group.
GROUPS = {str(folder.relative_to(CONF)) for folder in CONF.rglob("*") if folder.is_dir() and folder.name != "base"}

USERS = "command-line"  # the provider of the user's folders


class SearchPath(Hydra):
    """Hydra, with the options of every group of the search path."""

    def options(self, group: str) -> list[str]:
        """The options of a group; none: it is no group."""
        return list(self.config_loader.get_group_options(group))

    def list_all_config_groups(self, parent: str = "") -> Sequence[str]:
        """The groups of ``conf/``, Hydra's own, and those at the top of the user's folders.

        Deeper folders of the user are not searched for groups, since they may be large.
        """
        if parent:
            return super().list_all_config_groups(parent)
        own = {group for group in self.config_loader.list_groups("") if self.options(group)}
        return sorted(GROUPS | own) + list(super().list_all_config_groups("hydra"))


@cache
def hydra_with(folders: tuple[str, ...]) -> SearchPath:
    """Hydra with ``conf/`` and then these folders, such as ``file:///home/me/conf`` or ``pkg://package.conf``.

    Raises:
        ConfigError: a folder does not exist, or one of its files has the name of a file in ``conf/``, which comes first.
    """
    version.setbase("1.3")
    path = create_config_search_path(str(CONF))
    schema = path.get_path().pop()
    for folder in folders:
        path.append(USERS, folder)
    path.get_path().append(schema)
    try:
        hydra = SearchPath("sae-rl", ConfigLoaderImpl(path))
    except ValueError as error:  # a schema such as s3://
        raise ConfigError([f"hydra.searchpath: {error}"]) from error
    problems = []
    for source in hydra.config_loader.get_sources():
        if source.provider != USERS:
            continue
        if not source.available():
            problems.append(f"{source.full_path()}: there is no such folder of configurations")
        for group in ("", *sorted(GROUPS)) if source.scheme() == "file" else ():
            for file in sorted((Path(source.path) / group).glob("*.yaml")):
                if (hides := CONF / group / file.name).exists():
                    problems.append(f"{file} is never read, since {hides} comes first: rename it")
    if problems:
        raise ConfigError(problems)
    return hydra
