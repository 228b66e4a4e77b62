"""How all pictures of a report are drawn: colours that work in light and dark, the style of a method, and figures as SVG or PNG.

A figure is drawn once, in the light colours below. In the page every one of these colours is a variable of the style sheet,
so that the same picture is readable on a dark background.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mas_embed.runtime.text import printable, shortened

# The name of a colour in the style sheet, and its value on a light background, in which pictures are drawn
INK, MUTED, LINE, HEAT, WRONG, PAPER = "#1c2024", "#60656c", "#d5d8dd", "#15457d", "#b3400a", "#fefefe"
# Okabe and Ito's colours, darkened where they are pale: people who see colours differently can tell them apart
COLORS = ("#0069a3", "#c65102", "#00855f", "#b2558c", "#a87400", "#2f8fc4", "#6b5fb5", "#7a6a4f")
REFERENCE = "#4a4f55"  # a method that is trained on everything at once
VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", HEAT: "heat", WRONG: "wrong", PAPER: "paper", REFERENCE: "reference",
    **{color: f"series-{index}" for index, color in enumerate(COLORS)},
}  # fmt: skip

LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))  # where methods are more than colours
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LONGEST_NAME = 32  # characters
DOTS_PER_INCH = 130
MOST_DOTS = 30_000  # of a side of a picture; Matplotlib draws fewer than 2**16
PIXELS_PER_INCH = 72  # of a figure: one point is one pixel of the page


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every picture.

    Attributes:
        color: of its lines and points.
        line: the style of its lines.
        marker: of its points.
        group: the class of what is drawn for it, by which the page shows and hides it.
    """

    color: str
    line: Any
    marker: str
    group: str


@dataclass(frozen=True)
class Picture:
    """A figure inside the page.

    Attributes:
        svg: the figure; its root has the role and the label of an image.
        label: what it shows, for those who do not see it.
        width: of the figure in pixels, below which its text becomes too small.
    """

    svg: Markup
    label: str
    width: int


def styles_of(methods: Sequence[str], references: Sequence[str] = ()) -> dict[str, Style]:
    """The style of every method; references, which are trained on everything at once, are grey and dashed."""
    others = [method for method in methods if method not in references]
    styles = {}
    for method in methods:
        group = f"method-{list(methods).index(method)}"
        if method in references:
            styles[method] = Style(REFERENCE, (0, (5, 2)), "*", group)
        else:
            index = others.index(method)
            line = LINES[index // len(COLORS) % len(LINES)]
            styles[method] = Style(COLORS[index % len(COLORS)], line, MARKERS[index % len(MARKERS)], group)
    return styles


def drawn(name: str, limit: int = LONGEST_NAME) -> str:
    r"""A name as Matplotlib draws it unchanged: shortened, without formulas, and not left out of legends for a "_" at its start.

    >>> drawn(r"$\frac$"), drawn("_hidden")
    ('\\$\\frac\\$', ' _hidden')
    """
    text = shortened(printable(name), limit).replace("$", r"\$")
    return f" {text}" if text.startswith("_") or not text else text


@dataclass(frozen=True)
class Margins:
    """The room around what a figure shows, in pixels: for the names of ticks and axes."""

    left: float = 34
    bottom: float = 24
    right: float = 8
    top: float = 8


def panels(
    width: float, height: float, margins: Margins, *, num_columns: int = 1, gap: float = 0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, side by side; all sizes are in pixels of the page.

    The margins are given instead of measured, because measuring them takes longer than drawing.

    Args:
        width: of the figure.
        height: of the figure.
        margins: around all panels.
        num_columns: of panels.
        gap: between two panels.
        options: of `Figure.subplots`.
    """
    figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
    panel_width = (width - margins.left - margins.right - gap * (num_columns - 1)) / num_columns
    found = figure.subplots(1, num_columns, squeeze=False, **options)
    figure.subplots_adjust(
        left=margins.left / width,
        right=1 - margins.right / width,
        bottom=margins.bottom / height,
        top=1 - margins.top / height,
        wspace=gap / panel_width,
    )
    return figure, list(found[0])


def panel(width: float, height: float, margins: Margins) -> tuple[Figure, Axes]:
    """A figure of one panel, see `panels`."""
    figure, (axis,) = panels(width, height, margins)
    return figure, axis


def room_for(names: Sequence[str], *, size: float = 12, most: float = 170) -> float:
    """The pixels that the longest of some names takes beside an axis, about."""
    return min(most, 0.6 * size * max(map(len, names), default=0) + 10)


def room_below(names: Sequence[str], width: float) -> float:
    """The pixels that names take below an axis of a width: a line, or more where they stand at an angle."""
    longest = max(map(len, names), default=0)
    return 24 if not names_are_narrow(names, width) else 4.6 * longest + 18


def names_are_narrow(names: Sequence[str], width: float) -> bool:
    """Whether a width in pixels is not enough for names side by side."""
    return any(6.2 * len(name) > width / max(1, len(names)) for name in names)


def plain_axis(axis: Axes) -> None:
    """Takes everything from an axis that is no data: the box, and tick marks; and makes the rest quiet."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(LINE)
    axis.tick_params(length=0, labelcolor=MUTED, labelsize=10, color=LINE)
    axis.xaxis.label.set(color=MUTED, size=10)
    axis.yaxis.label.set(color=MUTED, size=10)
    axis.title.set(color=INK, size=12, weight="bold")
    axis.grid(axis="y", color=LINE, linewidth=0.6)
    axis.set_axisbelow(True)


def name_ticks(axis: Axes, names: Sequence[str], *, width: float) -> None:
    """The names below the x axis, upright where the width in pixels is not enough for them side by side."""
    axis.set_xticks(range(len(names)), names)
    if names_are_narrow(names, width):
        for label in axis.get_xticklabels():
            label.set(rotation=45, rotation_mode="anchor", ha="right")


def score_limits(lowest: float, highest: float) -> tuple[float, float]:
    """A scale for scores that holds both, in steps of .05, and leaves some room, but none above 1.

    >>> score_limits(0.21, 0.83), score_limits(0.21, 0.99)
    ((0.2, 0.85), (0.2, 1.0))
    """
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        return 0.0, 1.0
    step = 0.05 if highest - lowest <= 2 else 10 ** math.floor(math.log10(highest - lowest)) / 2
    low, high = step * math.floor(lowest / step + 1e-9), step * math.ceil(highest / step + 0.1)
    high = 1.0 if highest <= 1 < high else high
    return round(low, 10), round(high if high > low else low + step, 10)


def picture(figure: Figure, label: str) -> Picture:
    """The figure as an element of the page, in the colours of its style sheet."""
    svg = svg_of(figure)
    content = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg[svg.index("<svg ") :], count=1, flags=re.DOTALL)
    prefix = hashlib.sha256((content + label).encode(errors="replace")).hexdigest()[:8]
    used = set(re.findall(r"#([\w.-]+)[\")]", content))
    content = re.sub(r"<[^>]*>", lambda tag: _tag_of_page(tag[0], prefix, used), content)
    width, height = (round(size * PIXELS_PER_INCH) for size in figure.get_size_inches())
    root = (
        f'<svg class="picture" role="img" aria-label="{html.escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    )
    return Picture(Markup(root + content[content.index(">") + 1 :]), label, width)  # noqa: S704 (Matplotlib escapes every text)


def svg_of(figure: Figure) -> str:
    """The figure as the text of an SVG file, its text as text."""
    found = io.StringIO()
    with _drawn_quietly(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(found, format="svg", transparent=True, dpi=PIXELS_PER_INCH, metadata=nothing)
    return found.getvalue()


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG file; characters that the font does not have are drawn as boxes, without a warning."""
    found = io.BytesIO()
    resolution = min(DOTS_PER_INCH, MOST_DOTS / max(figure.get_size_inches()))
    with _drawn_quietly():
        figure.savefig(found, format="png", dpi=resolution)
    return found.getvalue()


@contextmanager
def _drawn_quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _tag_of_page(tag: str, prefix: str, used: set[str]) -> str:
    """A tag of a figure as it stands in the page: with the page's font and colours, and names that no other picture has."""
    tag = " ".join(tag.split())
    tag = re.sub(r" id=\"(method-\d+)\"", r' class="\1"', tag)
    tag = re.sub(r" id=\"([^\"]*)\"", lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", tag)
    tag = re.sub(r"(url\(|href=\")#", rf"\g<1>#{prefix}", tag).replace("xlink:href", "href")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), tag)


def _variable(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color
