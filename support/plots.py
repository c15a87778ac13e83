"""Plots that know nothing of diffusion: two axes, strips of images, boxes joined by arrows, for files and notebooks.

The colours are the eight of Okabe and Ito, which colour-blind people can tell apart. Matplotlib is imported late, as
`--help` needs none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from support.grids import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#E69F00", "#56B4E9", "#F0E442", "#000000")
GREY = "#777777"
BEND = {"arrowstyle": "->", "color": GREY, "linestyle": "--", "connectionstyle": "arc3,rad=-0.15"}


def draw_for_files() -> None:
    """Makes matplotlib draw into files, independently of the user's style, fonts and windows."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcdefaults()


def draw_for_notebooks() -> None:
    """Makes matplotlib draw on the background of a notebook, light or dark: transparent, with grey text.

    The colours of curves can be told from both. The figures are PNG, small enough to be stored in the notebook.
    """
    import matplotlib

    names = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"
    matplotlib.rcParams.update(dict.fromkeys(names, GREY))
    matplotlib.rcParams.update({"axes.facecolor": "none", "figure.dpi": 100, "image.interpolation": "nearest"})
    if "ipykernel" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Not figure.facecolor: of a transparent figure the backend says that it needs a light background.
        set_matplotlib_formats("png", bbox_inches="tight", facecolor="none")


def arrow() -> dict[str, str]:
    """The style of an arrow, in the colour of text."""
    import matplotlib

    return {"arrowstyle": "->", "color": matplotlib.rcParams["text.color"]}


def two_axes(x_label: str, *y_labels: str) -> tuple[Figure, Axes, Axes]:
    """A figure with two axes side by side over the same quantity."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, y_label in zip((left, right), y_labels, strict=True):
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    return figure, left, right


def two_curves(
    x_label: str, x: Sequence[float], left: tuple[str, Sequence[float]], right: tuple[str, Sequence[float]]
) -> tuple[Figure, Axes, Axes]:
    """Two quantities, pairs of a label and values, over the same x, each with an axis and a scale of its own."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.set_xlabel(x_label)
    axis.grid(alpha=0.3, which="both")
    axes = axis, axis.twinx()
    for one, (label, values), colour, style in zip(
        axes, (left, right), (BLUE, VERMILION), ("o-" if len(x) < 40 else "-", "--"), strict=True
    ):
        one.plot(x, values, style, color=colour)
        one.set_ylabel(label, color=colour)
    return figure, *axes


def strip(rows: Iterable[Iterable[np.ndarray]], titles: Sequence[str], names: Sequence[str]) -> Figure:
    """Rows of images (height, width, channels), values 0 … 255, titles above the columns, names beside the rows."""
    import matplotlib.pyplot as plt

    rows = [[visible(image) for image in row] for row in rows]
    height, width, _ = rows[0][0].shape
    size = (1.3 * len(titles) + 0.4, 1.3 * len(rows) * height / width + 0.3)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False, layout="constrained")
    for row, images, name in zip(axes, rows, names, strict=True):
        for axis, image in zip(row, images, strict=True):
            pixels = image.astype(np.uint8)
            axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def boxes(
    texts: Sequence[str], levels: Sequence[int], colours: Sequence[str], joins: Iterable[tuple[int, int]]
) -> tuple[Figure, Axes]:
    """Boxes from left to right, with an arrow from each to the next.

    Args:
        texts, colours: one for each box.
        levels: how many levels below the top each box lies.
        joins: pairs of boxes; a dashed arrow goes from the first to the arrow that enters the second.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    figure, axis = plt.subplots(figsize=(13.5, 4.6), layout="constrained")
    for k, (text, level, colour) in enumerate(zip(texts, levels, colours, strict=True)):
        light = 0.75 + 0.25 * np.array(to_rgb(colour))  # opaque, so that black can be read on any background
        axis.add_patch(plt.Rectangle((k - 0.43, -level - 0.28), 0.86, 0.56, color=light))
        axis.text(k, -level, text, ha="center", va="center", fontsize=7.5, color="black")
        if k:
            axis.annotate("", (k - 0.43, -level), (k - 0.57, -levels[k - 1]), arrowprops=arrow())
    for start, end in joins:
        entry = (end - 0.5, -(levels[end - 1] + levels[end]) / 2)
        axis.annotate("", entry, (start, 0.3 - levels[start]), arrowprops=BEND)
    axis.set_xlim(-0.6, len(texts) - 0.4)
    axis.set_ylim(-max(levels) - 1.5, 1.3)
    axis.axis("off")
    return figure, axis
