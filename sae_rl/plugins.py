"""Errors in code that a user wrote: each names the class or function, its file and line, and what was found there."""

from __future__ import annotations

import dataclasses
import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import CodeType


class PlugInError(ValueError):
    """An exception in a user's class or function. The message begins with its import path, file and line."""


def is_users(plug_in: object) -> bool:
    """Whether a class, a function or an object of a class is a user's, or has a field that holds one."""
    if isinstance(plug_in, list | tuple):
        return any(map(is_users, plug_in))
    module = str(getattr(_definition(plug_in), "__module__", "builtins"))
    if module.partition(".")[0] not in ("sae_rl", "builtins"):
        return True
    if not dataclasses.is_dataclass(plug_in) or isinstance(plug_in, type):
        return False
    return any(is_users(getattr(plug_in, field.name)) for field in dataclasses.fields(plug_in))


@contextmanager
def named(plug_in: object) -> Iterator[None]:
    """Raises a `PlugInError` for every exception of its block, if ``plug_in`` is a user's; MemoryError stays what it is."""
    try:
        yield
    except (PlugInError, MemoryError):
        raise
    except Exception as error:
        definition = _definition(plug_in)
        module = str(getattr(definition, "__module__", None))
        if module.partition(".")[0] == "sae_rl":
            raise
        path = f"{module}:{getattr(definition, '__qualname__', repr(definition))}"
        raise PlugInError(f"{path} ({_place(definition, error)}): {said(error)}") from error


def said(error: BaseException) -> str:
    """What an exception says, in one line. For an attribute that one of our objects lacks, it lists those that there are."""
    try:
        message = " ".join(str(error).split())
    except Exception as another:  # a user's __str__ may raise
        message = f"(its message cannot be read: {type(another).__name__})"
    message = message if type(error) is ValueError else f"{type(error).__name__}: {message}"
    if not isinstance(error, AttributeError) or not type(error.obj).__module__.startswith("sae_rl."):
        return message
    kind, fields = type(error.obj), getattr(error.obj, "__dataclass_fields__", {})
    names = [*fields, *(name for name, member in vars(kind).items() if isinstance(member, property))]
    near = [f", did you mean {name!r}?" for name in get_close_matches(error.name, names, n=1)]
    return f"{message}{''.join(near) or ';'} {kind.__name__} has {', '.join(names)}"


def place_in(error: BaseException, module: str) -> str | None:
    """File, line and source text where an exception came from: the innermost place in the package of ``module``."""
    package = module.partition(".")[0]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.walk_tb(error.__traceback__)]
    for frame, line in reversed(frames):
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            file = frame.f_code.co_filename
            return f"{file}, line {line}: {linecache.getline(file, line).strip()}"
    return None


def _definition(plug_in: object) -> object:
    """The class of an object, or the class or function itself."""
    return plug_in if hasattr(plug_in, "__qualname__") else type(plug_in)


def _place(definition: object, error: Exception) -> str:
    """Where the error was raised; if that is outside of the user's code, such as for a wrong result: what was called."""
    place = place_in(error, str(getattr(definition, "__module__", None)))
    called = vars(definition).get("__call__") if isinstance(definition, type) else definition
    code = getattr(called, "__code__", None)
    return place or (f"{code.co_filename}, line {code.co_firstlineno}" if isinstance(code, CodeType) else "no source")
