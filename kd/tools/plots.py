"""Figures in one style: the curves of a run's page, and whatever `drawing` is used for."""

import base64
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kd import BadInput
from kd.tools.predictions import ROLES

COLOURS = {"teacher": "#a8650a", "control": "#8b867d", "student": "#0d6f8a"}  # the colour-blind can tell them apart
PALETTE = {"ground": "#fbfaf8", "panel": "#ffffff", "ink": "#1d1c1a", "muted": "#68645d", "line": "#e3dfd8",
           "wrong": "#b2352b", **COLOURS}
STYLE = {
    "text.color": PALETTE["ink"], "axes.labelcolor": PALETTE["muted"],
    "xtick.color": PALETTE["line"], "xtick.labelcolor": PALETTE["muted"],
    "ytick.color": PALETTE["line"], "ytick.labelcolor": PALETTE["muted"],
    "figure.facecolor": PALETTE["ground"], "axes.edgecolor": PALETTE["line"], "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": PALETTE["line"], "grid.linewidth": 0.7,
    "font.size": 9, "axes.labelsize": 9, "legend.fontsize": 8.5, "legend.frameon": False,
    "lines.linewidth": 1.8, "text.parse_math": False, "savefig.format": "svg",
    "svg.fonttype": "none",   # text stays text
    "svg.hashsalt": "kd",     # the same run gives the same bytes
}
LINE_STYLES = {"teacher": "-", "control": (0, (4, 2)), "student": "-"}


@contextlib.contextmanager
def drawing(file: Path | io.BytesIO, size: tuple[float, float], panels: int = 1) -> Iterator[list[Any]]:
    """A new figure of that size in inches, as the axes of its panels, which is written to `file` in the end.

    The ending of `file` decides the format: svg, png or pdf. Raises BadInput where it cannot be written.
    """
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=size, layout="constrained")
        yield list(figure.subplots(1, panels, squeeze=False)[0])
        is_svg = not isinstance(file, Path) or file.suffix == ".svg"
        try:
            figure.savefig(file, metadata={"Date": None} if is_svg else None)
        except (OSError, ValueError) as error:  # ValueError: an unknown format
            raise BadInput(f"--figure {file}: cannot be written ({getattr(error, 'strerror', None) or error})"
                           ) from error


def data_uri(kind: str, content: bytes) -> str:
    """kind: of the picture, such as jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def curves(history: list[dict[str, Any]], key: str, select: str) -> str:
    """One quantity of metrics.jsonl over the epochs, a line a role, as a data URI.

    Of the accuracy, a star marks the epoch whose weights were kept: the best or the last one.
    """
    buffer = io.BytesIO()
    with drawing(buffer, (3.9, 2.75)) as (axes,):
        for role in ROLES:
            epochs = [entry["epoch"] for entry in history if entry["role"] == role]
            values = [entry[key] for entry in history if entry["role"] == role]
            if not epochs:
                continue
            axes.plot(epochs, values, color=COLOURS[role], label=role, linestyle=LINE_STYLES[role],
                      marker="." if len(epochs) < 3 else None)
            if key == "accuracy":
                kept = -1 if select == "last" else int(np.argmax(values))
                axes.plot(epochs[kept], values[kept], "*", color=COLOURS[role], markersize=13, clip_on=False,
                          markeredgecolor=PALETTE["ground"], markeredgewidth=0.8, zorder=4)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if key == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        else:
            axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    # matplotlib lays text out in its own font; shown in the reader's, it looks like the rest of the page
    svg = re.sub(rb"font: ([\d.]+px) [^;\"]+", rb"font: \1 system-ui, sans-serif", buffer.getvalue())
    return data_uri("svg+xml", svg)
