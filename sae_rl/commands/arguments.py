"""Arguments of the commands that take folders and options, and no configuration."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sae_rl.settings import ConfigError


class Arguments(argparse.ArgumentParser):
    """Tells what is wrong as every command does."""

    advice = ""  # for the end of each message

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{self.prog}: {message}{self.advice}"])
