"""Folders of images by class, with what else is found in such folders."""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter
from pathlib import Path

from mas_embed.errors import UserError
from mas_embed.runtime.reading import read_errors_explained
from mas_embed.runtime.text import printable, shortened

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}  # in lower and upper case
# Files and folders that systems leave behind, and everything whose name begins with a dot
CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}


class ClassFolders:
    """The folders of a directory, each with its image files in alphabetical order; nothing is decoded.

    What is not used is collected, for `warn`: empty folders, files that have no suffix of an image, and folders inside the
    folders of a class.
    """

    def __init__(self) -> None:
        self.empty: list[Path] = []
        self.others: list[Path] = []

    def read(self, folder: Path) -> dict[str, list[Path]]:
        """The image files of a directory by class; the names of the classes are in Unicode's composed form.

        Raises:
            UserError: the directory cannot be read, or two of its folders have names that look the same.
        """
        classes: dict[str, list[Path]] = {}
        for path in entries(folder):
            if not path.is_dir():
                self.others.append(path)
                continue
            name = unicodedata.normalize("NFC", path.name)
            if name in classes:
                raise UserError(f"{folder} holds two folders with the name '{printable(name)}'; rename one")
            files = self._images(path)
            if files:
                classes[name] = files
            else:
                self.empty.append(path)
        return classes

    def warn(self, root: Path) -> None:
        """Warns, in one sentence each, of empty classes and of files that are not used.

        Warns:
            UserWarning: there are some.
        """
        if self.empty:
            warnings.warn(
                f"folders without an image are left out of {root}: {_shown(self.empty, root)}",
                stacklevel=4,
            )
        warn_of_others(self.others, root, "are no image files in the folder of a class", stacklevel=5)

    def _images(self, folder: Path) -> list[Path]:
        found = []
        for path in entries(folder):
            if path.suffix.lower() in SUFFIXES and not path.is_dir():
                found.append(path)
            else:
                self.others.append(path)
        return found


def warn_of_others(paths: list[Path], root: Path, reason: str, *, stacklevel: int = 3) -> None:
    """Warns in one sentence of files and folders in a directory that are not used; says nothing if there are none.

    Warns:
        UserWarning: there are some.
    """
    if not paths:
        return
    suffixes = Counter("a folder" if path.is_dir() else path.suffix or "no suffix" for path in paths)
    kinds = ", ".join(f"{printable(suffix)} ({count})" for suffix, count in suffixes.most_common(5))
    warnings.warn(
        f"{len(paths)} entries of {root} {reason} and are left out: {kinds}; such as {_shown(paths, root)}",
        stacklevel=stacklevel,
    )


def entries(folder: Path) -> list[Path]:
    """Everything in a directory in alphabetical order, without what systems leave behind.

    Raises:
        UserError: it cannot be read.
    """
    with read_errors_explained(folder, "the folder"):
        return [path for path in sorted(folder.iterdir()) if not is_clutter(path)]


def is_clutter(path: Path) -> bool:
    """Whether a file or folder is one that a system has left behind, such as .DS_Store or Thumbs.db."""
    return path.name.startswith(".") or path.name.lower() in CLUTTER


def _shown(paths: list[Path], root: Path) -> str:
    names = ", ".join(str(path.relative_to(root)) for path in paths[:3])
    return shortened(printable(names)) + (", ..." if len(paths) > 3 else "")
