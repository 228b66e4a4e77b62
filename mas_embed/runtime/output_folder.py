"""Folders that are written into: nothing in them is replaced, followed or removed but what this program wrote.

A folder of ours is marked by a file. A folder without the mark may be written into, too, if it holds no file of the names that
will be written.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mas_embed.errors import UserError
from mas_embed.runtime.atomic_files import TEMPORARY_FILES, write_errors_explained, write_file
from mas_embed.runtime.json_text import json_text
from mas_embed.runtime.reading import read_json

MARK_FILE = ".mas-embed.json"
LOCK_FILE = ".mas-embed.lock"


def is_marked(folder: Path) -> bool:
    """Whether this program has marked the folder as its own."""
    return _kind_of(folder / MARK_FILE) == "file"


def read_mark(folder: Path) -> dict[str, Any] | None:
    """What was noted in the mark of a folder: nothing where there is no mark; None for a mark that is damaged."""
    try:
        content = read_json(folder / MARK_FILE, "the mark") if is_marked(folder) else {}
    except UserError:
        return None
    return content if isinstance(content, dict) else None


def mark_folder(folder: Path, content: Mapping[str, Any]) -> None:
    """Makes the folder and those above it, and marks it, with something noted in the mark.

    Raises:
        UserError: the folder cannot be made or written.
        RunError: the disk is full.
    """
    with write_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / MARK_FILE, json_text({"program": "mas-embed", **content}, indent=1) + "\n")


def check_files(folder: Path, files: Iterable[str], *, is_ours: bool) -> None:
    """Raises `UserError` unless all of some files may be written.

    Args:
        folder: that they are in.
        files: their paths inside the folder.
        is_ours: whether the folder is marked, or known otherwise to hold what an earlier version wrote. Files of other
            folders are never replaced.
    """
    kind = _kind_of(folder, follow=True)
    if kind not in (None, "folder"):
        raise UserError(f"{folder} is a {kind}, not a folder; name another with --out")
    for file in files:
        path = folder
        for part in (*Path(file).parent.parts, None):
            path = path / (part or Path(file).name)
            kind, expected = _kind_of(path), "folder" if part else "file"
            if kind is None:
                break
            if kind != expected:
                raise UserError(
                    f"{path} is a {kind}, where a {expected} is to be written; remove it, or name another --out"
                )
        else:
            if not is_ours:
                raise UserError(
                    f"{path} is there already, and was not written by mas-embed; name another folder with --out"
                )


@contextmanager
def locked(folder: Path, *, name: str = LOCK_FILE, refusal: str | None = None) -> Iterator[None]:
    """Keeps other processes from writing into a folder that exists, for the body of the `with` statement.

    Args:
        folder: that is locked.
        name: of the file that is locked for it.
        refusal: the sentence for the process that comes second.

    Raises:
        UserError: another process does so already, or the folder cannot be written.
    """
    lock = FileLock(folder / name)
    with write_errors_explained(folder / name):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            sentence = f"another process is writing into {folder}; wait for its end, or name another --out"
            raise UserError(refusal or sentence) from None
    try:
        yield
    finally:
        lock.release()


def remove_temporary_files(folder: Path) -> None:
    """Removes what a killed process has left of files that it was writing."""
    with write_errors_explained(folder):
        for path in folder.glob(TEMPORARY_FILES):
            if _kind_of(path) == "file":
                path.unlink()


def _kind_of(path: Path, *, follow: bool = False) -> str | None:
    """What is at a path; None for nothing. Links are not followed unless asked for."""
    try:
        mode = path.stat(follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "pipe or device")
