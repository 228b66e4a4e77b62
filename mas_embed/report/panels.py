"""The parts that the sections of the page are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mas_embed.report.drawing import Picture

NARROW = 340  # pixels that a picture may have on a phone


@dataclass(frozen=True)
class Panel:
    """A picture with what stands above it; on narrow screens another one where there is one.

    Attributes:
        picture: the figure.
        title: above it.
        narrow: the figure for narrow screens.
    """

    picture: Picture
    title: str = ""
    narrow: Picture | None = None


@dataclass(frozen=True)
class Key:
    """A method in the legend of a picture.

    Attributes:
        name: of the method.
        group: the class of what is drawn for it.
        swatch: how its lines are drawn.
    """

    name: str
    group: str
    swatch: Picture
