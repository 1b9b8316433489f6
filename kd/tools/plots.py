"""The plots of a run's page: SVG, once for a light page and once for a dark one."""

import base64
import io
import re
from typing import Any, Callable, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kd.scores import BINS, Bin
from kd.tools.predictions import ROLES
from kd.tools.report import COLOURS

Palette = dict[str, str]

# One palette for the page and its plots. The colour-blind can tell the roles apart in both.
LIGHT: Palette = {"ground": "#fbfaf8", "panel": "#ffffff", "ink": "#1d1c1a", "muted": "#68645d",
                  "line": "#e3dfd8", "wrong": "#b2352b", **COLOURS}
DARK: Palette = {"ground": "#141413", "panel": "#1c1c1a", "ink": "#eceae5", "muted": "#a19c93",
                 "line": "#35332f", "wrong": "#f2897d",
                 "teacher": "#e3a94c", "control": "#9b968d", "student": "#55bad8"}
LINE_STYLES = {"teacher": "-", "control": (0, (4, 2)), "student": "-"}


class Plot(NamedTuple):
    """An SVG picture as two data URIs, and its size in CSS pixels."""

    light: str
    dark: str
    width: int
    height: int


def draw_plot(draw: Callable[[Figure, Palette], None], width: float = 3.9, height: float = 2.75,
              raster: bool = False) -> Plot:
    """What `draw` puts on a figure of this size, in inches, in the colours of either palette.

    raster: it has colours in pixels. They cannot be exchanged, so the figure is drawn for each palette.
    """
    light = _svg(draw, LIGHT, width, height)
    dark = _svg(draw, DARK, width, height) if raster else _recolour(light)   # drawing takes most of a page's time
    return Plot(_data_uri(light), _data_uri(dark), round(96 * width), round(96 * height))


def _recolour(svg: str) -> str:
    """Each colour of LIGHT becomes that of DARK with the same name. No two of LIGHT are the same."""
    dark = {LIGHT[name]: DARK[name] for name in LIGHT}
    return re.sub("#[0-9a-f]{6}", lambda colour: dark.get(colour[0], colour[0]), svg)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _svg(draw: Callable[[Figure, Palette], None], palette: Palette, width: float, height: float) -> str:
    style = {
        "text.color": palette["ink"], "axes.labelcolor": palette["muted"],
        "xtick.color": palette["line"], "xtick.labelcolor": palette["muted"],
        "ytick.color": palette["line"], "ytick.labelcolor": palette["muted"],
        "axes.edgecolor": palette["line"], "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": palette["line"], "grid.linewidth": 0.7,
        "font.size": 9, "axes.labelsize": 9, "legend.fontsize": 8.5, "legend.frameon": False,
        "lines.linewidth": 1.8, "text.parse_math": False,
        "svg.fonttype": "none",   # text stays text
        "svg.hashsalt": "kd",     # the same run gives the same bytes
    }
    with matplotlib.style.context(["default", style]):  # whatever the user's matplotlibrc says
        figure, buffer = Figure(figsize=(width, height), layout="constrained"), io.StringIO()
        draw(figure, palette)
        figure.savefig(buffer, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # matplotlib lays text out in its own font; shown in the reader's, it looks like the rest of the page
    return re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", buffer.getvalue())


def curves(history: list[dict[str, Any]], key: str, select: str = "best") -> Plot:
    """One quantity of metrics.jsonl over the epochs, a line a role.

    Of the accuracy, a star marks the epoch whose weights were kept: the best or the last one.
    """
    percent = key == "accuracy"

    def draw(figure: Figure, palette: Palette) -> None:
        axes: Axes = figure.subplots()
        for role in ROLES:
            entries = [entry for entry in history if entry["role"] == role]
            if not entries:
                continue
            epochs, values = [entry["epoch"] for entry in entries], [entry[key] for entry in entries]
            axes.plot(epochs, values, color=palette[role], label=role, linestyle=LINE_STYLES[role],
                      marker="." if len(entries) < 3 else None)
            if percent:
                kept = -1 if select == "last" else int(np.argmax(values))
                axes.plot(epochs[kept], values[kept], "*", color=palette[role], markersize=13, clip_on=False,
                          markeredgecolor=palette["ground"], markeredgewidth=0.8, zorder=4)

        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        else:
            axes.set_ylim(bottom=0)
        axes.legend(loc="best")

    return draw_plot(draw)


def reliability(bins: list[Bin], role: str) -> Plot:
    """Above, the accuracy by confidence; below, the share of the samples with that confidence."""
    middle = [each.middle for each in bins]
    samples = np.array([each.samples for each in bins])
    # the fewer the samples, the fainter, because their accuracy is the less certain
    opacity = [float(0.25 + 0.75 * min(1.0, count / 10)) for count in samples]

    def draw(figure: Figure, palette: Palette) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))

        above.bar(middle, [each.accuracy for each in bins], 0.9 / BINS,
                  color=[(palette[role], alpha) for alpha in opacity])
        above.plot([0, 1], [0, 1], color=palette["ink"], linestyle=":", linewidth=1.4, zorder=3)
        above.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="share that is right")

        below.bar(middle, samples / samples.sum(), 0.9 / BINS, color=palette["muted"])
        below.set(xlabel="confidence (the top probability)", ylabel="samples")
        below.yaxis.set_major_locator(MaxNLocator(2))

        for axis in (above.yaxis, below.xaxis, below.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))

    return draw_plot(draw, 3.9, 3.4)


def heat_map(shares: np.ndarray, role: str) -> Plot:
    """A confusion matrix `(C, C)`, whose rows are shares of the true class, as a picture."""
    def draw(figure: Figure, palette: Palette) -> None:
        axes: Axes = figure.subplots()
        axes.grid(False)
        axes.imshow(shares, vmin=0, vmax=1, interpolation="nearest",
                    cmap=LinearSegmentedColormap.from_list(role, [palette["panel"], palette[role]]))
        axes.set(xlabel="predicted class", ylabel="true class")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))

    return draw_plot(draw, 3.4, 3.2, raster=True)
