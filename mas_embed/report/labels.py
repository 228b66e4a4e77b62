"""Names beside the points of a picture, none above another."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from mas_embed.report.drawing import INK, LINE, drawn

CHARACTER_WIDTH, HEIGHT = 6.4, 13.0  # pixels of a letter of a name, about
FAR = 20  # pixels, from which a line leads from the point to its name

Box = tuple[float, float, float, float]  # left, low, right, top


def label_points(axis: Axes, points: Mapping[str, tuple[float, float]], *, leaves_out: bool = False) -> None:
    """Writes the names beside the points, each at the first place where it covers no other name and no point.

    Args:
        axis: on which the points are drawn.
        points: by name, in the order in which they are written.
        leaves_out: leaves out a name that has no free place, instead of writing it where it covers something.
    """
    axis.autoscale_view()
    pixels = {name: axis.transData.transform(point) for name, point in points.items()}
    frame = axis.get_window_extent()
    placed: list[Box] = []
    for name, (x, y) in pixels.items():
        text = drawn(name, 20)
        taken = [*placed, *((u - 6, v - 6, u + 6, v + 6) for other, (u, v) in pixels.items() if other != name)]
        boxes = _boxes_beside(x, y, width=CHARACTER_WIDTH * len(text))
        inside = [box for box in boxes if box[0] >= frame.x0 and box[2] <= frame.x1 and frame.y0 <= box[1] <= frame.y1]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        if leaves_out and not free:
            continue
        left, low, right, top = (free or inside or boxes)[0]
        placed.append((left, low, right, top))
        u, v = axis.transData.inverted().transform(((left + right) / 2, (low + top) / 2))
        if abs((low + top) / 2 - y) > FAR:
            axis.plot([points[name][0], u], [points[name][1], v], color=LINE, linewidth=0.8, zorder=1)
        axis.text(u, v, text, ha="center", va="center_baseline", color=INK, size=11)


def _boxes_beside(x: float, y: float, *, width: float) -> list[Box]:
    """Where a name may stand beside a point, the best place first."""
    boxes = []
    for distance in (9, 16, 26, 38):
        low = y - HEIGHT / 2
        corners = [(x + distance, low), (x - distance - width, low)]
        corners += [(left, low + shift) for left in (x + 4, x - 4 - width) for shift in (distance + 3, -distance - 3)]
        boxes += [(left, bottom, left + width, bottom + HEIGHT) for left, bottom in corners]
    return boxes


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
