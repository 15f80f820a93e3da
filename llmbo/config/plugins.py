"""Third parties' parts: what installed packages register under an entry-point group. Names are known without importing anything."""

import sys
from collections.abc import Collection
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any

from llmbo.errors import ConfigError, first_line, unknown


def installed(group: str) -> dict[str, EntryPoint]:
    """Everything in a group by name."""
    return {point.name: point for point in _points(group, tuple(sys.path))}


def plugin_named(what: str, group: str, name: str, own: Collection[str]) -> EntryPoint | None:
    """The plug-in behind a name, or None for one of our own.

    Args:
        what: What the name stands for, e.g. "strategy".

    Raises:
        ConfigError: There is none of that name, or more than one.
    """
    found = tuple(_points(group, tuple(sys.path)).select(name=name))
    if name not in own and not found:
        raise ConfigError(unknown(what, name, [*own, *installed(group)]))
    owners = [*(["llmbo"] if name in own else []), *map(_package, found)]
    if len(owners) > 1:
        raise ConfigError(
            f"The {what} '{name}' is brought by {' and by '.join(owners)}: uninstall one of them, or rename its entry point."
        )
    return found[0] if found else None


def loaded(what: str, point: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        ConfigError: It cannot be imported.
    """
    try:
        return point.load()
    except Exception as error:
        raise ConfigError(failure(what, point, error)) from error


def failure(what: str, point: EntryPoint, error: BaseException) -> str:
    """One line that says whose fault it is."""
    return f"The {what} '{point.name}' of {_package(point)} ({point.value}) failed ({type(error).__name__}: {first_line(error)})."


@cache
def _points(group: str, path: tuple[str, ...]) -> EntryPoints:
    """What is installed on `sys.path`, which belongs to the key: looking through all packages takes 10 ms, and a run asks a dozen times."""
    return entry_points(group=group)


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
