"""Which files a pattern means. As Python's `glob`, but each real file comes once, and each real folder is looked into once,
whatever links lie in them: a link to a folder above would otherwise have no end."""

import collections
import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator


def files_of(patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """(files of any of the patterns, sorted; patterns without a file). A `**` means any number of folders.

    A file that has several paths has one that leads through no link, else the first.
    """
    found: dict[str, str] = {}  # real path -> path
    empty = []
    for pattern in patterns:
        matches = [path for path in _matches(pattern) if os.path.isfile(path)]
        empty += [] if matches else [pattern]
        for path in matches:
            real = os.path.realpath(path)
            if real not in found or (_is_direct(path, real) and not _is_direct(found[real], real)):
                found[real] = path
    return sorted(found.values()), empty


def _is_direct(path: str, real: str) -> bool:
    """Whether a path leads through no link."""
    return os.path.abspath(path) == real


def _matches(pattern: str) -> list[str]:
    """Paths, those without links first."""
    *folders, last = [part for part in pattern.split("/") if part] or [""]
    found = ["/" if pattern.startswith("/") else ""]
    for part in folders:
        real: dict[str, str] = {}
        for path in (path for folder in found for path in _of_part(folder, part)):
            if os.path.isdir(path or "."):
                real.setdefault(os.path.realpath(path or "."), path)
        found = list(real.values())
    if last == "**":
        return [path for folder in found for inner in _folders_in(folder) for path in _of_part(inner, "*")]
    return [path for folder in found for path in _of_part(folder, last)]


def _of_part(folder: str, part: str) -> Iterator[str]:
    """What one part of a pattern means in a folder."""
    if part == "**":
        yield from _folders_in(folder)
    elif not glob.has_magic(part):
        yield os.path.join(folder, part)
    else:
        entries = [e for e in _entries(folder) if part.startswith(".") or not e.name.startswith(".")]
        yield from (os.path.join(folder, e.name) for e in entries if fnmatch.fnmatchcase(e.name, part))


def _folders_in(folder: str) -> Iterator[str]:
    """The folder, and every one below it: each real one once, those that only links lead to last."""
    seen, folders, links = set(), collections.deque([folder]), collections.deque()
    while folders or links:
        path = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(path or ".")
        if real in seen:
            continue
        seen.add(real)
        yield path
        for entry in _entries(path):
            inner = os.path.join(path, entry.name)
            if not entry.name.startswith(".") and os.path.isdir(inner):
                (links if entry.is_symlink() else folders).append(inner)


def _entries(folder: str) -> list[os.DirEntry]:
    """By name, links last; none of what is no folder or may not be read, as with `glob`."""
    try:
        with os.scandir(folder or ".") as found:
            return sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError:
        return []
