"""A finished run on one page: report.html, which needs no network, no script and no other file.

    python -m kd page RUN ...       draws it again, from result.json, metrics.jsonl and predictions.npz

predictions.npz holds the test logits of every model with labels, class names and sample names, and the pictures that
the page shows: all that is needed to study a run without its data. It is read with allow_pickle=False.
"""

import argparse
import base64
import io
import json
import math
import re
from html import escape
from pathlib import Path
from typing import Any, Callable, NamedTuple

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from kd import BadInput, cli
from kd.views import Spec, load_views
from kd.machine.files import write_atomic
from kd.tools.report import COLOURS, PREDICTIONS, ROLES, read_predictions, read_result
from kd.scores import log_softmax
from kd.data.frames import Data, center_crop

PAGE = "report.html"
SHOWN = 8        # pictures of each kind of error
THUMBNAIL = 160  # pixels, the longest side of such a picture
SHEET = 24       # views on the sheet
BINS = 15        # of confidence: those of `calibration_error`
TABLED = 12      # classes that a confusion matrix has as a table; more are a picture

# one palette for the page and the plots; the roles' colours stay apart for the colour-blind, in both themes
LIGHT = dict(ground="#fbfaf8", panel="#ffffff", ink="#1d1c1a", muted="#68645d", line="#e3dfd8",
             wrong="#b2352b", **COLOURS)
DARK = dict(ground="#141413", panel="#1c1c1a", ink="#eceae5", muted="#a19c93", line="#35332f",
            teacher="#e3a94c", control="#9b968d", student="#55bad8", wrong="#f2897d")
LINES = {"teacher": "-", "control": (0, (4, 2)), "student": "-"}


# ---- what a run keeps ----

class Errors(NamedTuple):
    """Numbers `(N,)` of the test samples in which not both are right, the surest mistakes first."""

    student: np.ndarray  # the student is wrong, the teacher right
    teacher: np.ndarray  # the teacher is wrong, the student right
    both: np.ndarray


def find_errors(labels: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> Errors:
    """The samples where the two disagree or both fail, from logits `(N, C)`: all but those that both have right."""
    right = {"teacher": teacher.argmax(1) == labels, "student": student.argmax(1) == labels}
    sure = {"teacher": log_softmax(teacher).max(1), "student": log_softmax(student).max(1)}

    def surest(chosen: np.ndarray, by: str) -> np.ndarray:
        numbers = np.flatnonzero(chosen)
        return numbers[np.argsort(-sure[by][numbers], kind="stable")]

    return Errors(surest(right["teacher"] & ~right["student"], "student"),
                  surest(right["student"] & ~right["teacher"], "teacher"),
                  surest(~right["teacher"] & ~right["student"], "student"))


def view_sheet(read: Callable[[np.ndarray], np.ndarray], labels: np.ndarray, rounds: int, *, seed: int, size: int,
               spec: Spec, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """The first views of some training samples, as the student sees them.

    rounds: how many views of a sample the run uses. Returns uint8 `(S, V, size, size, 3)` and the labels `(S,)`.
    """
    shown = min(rounds, 6)
    by_class = np.argsort(labels, kind="stable")  # evenly over that order, so that many classes are seen
    samples = by_class[np.linspace(0, len(labels) - 1, min(SHEET // shown, len(labels))).astype(np.int64)]
    views = [load_views(read, len(labels), samples, seed=seed, view=view, size=size, spec=spec, device=device)
             for view in range(shown)]
    return torch.stack(views, 1).permute(0, 1, 3, 4, 2).cpu().numpy(), labels[samples]


def keep(out: Path, logits: dict[str, np.ndarray], labels: np.ndarray, classes: tuple[str, ...],
         where: Callable[[int], str], read: Callable[[np.ndarray], np.ndarray], size: int, views: np.ndarray,
         view_labels: np.ndarray) -> None:
    """Write `out`/predictions.npz.

    logits: `(N, C)` by role; where: names a test sample; read: test sample numbers to frames `(B, R, R, 3)` uint8;
    views, view_labels: of `view_sheet`. Raises TrainingFault where the disk is full.
    """
    shown = np.concatenate([kind[:SHOWN] for kind in find_errors(labels, logits["teacher"], logits["student"])])
    side = min(size, THUMBNAIL)
    pictures = np.empty((len(shown), side, side, 3), np.uint8)
    for picture, frame in zip(pictures, center_crop(read(shown), size), strict=True):
        picture[:] = np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BOX))
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, labels=labels, classes=np.array(classes, np.str_), shown=shown,
             names=np.array([where(i) for i in range(len(labels))], np.str_), pictures=pictures, views=views,
             view_labels=view_labels, **{role: logits[role].astype(np.float32) for role in logits})  # type: ignore
    write_atomic(out / PREDICTIONS, buffer.getvalue())


def draw(out: Path, logits: dict[str, np.ndarray], data: Data, where: Callable[[int], str], rounds: int, seed: int,
         size: int, spec: Spec) -> Path:
    """Keep what the page shows of a run that has written its result.json, and draw it; returns the page's path.

    logits: on test, `(N, C)` by role; where: names a test sample; rounds, seed, size, spec: of the run's views.
    """
    views, view_labels = view_sheet(data.train.frames.read, data.train.labels, rounds, seed=seed, size=size, spec=spec,
                                    device=torch.device("cpu"))
    keep(out, logits, data.test.labels, data.classes, where, data.test.frames.read, size, views, view_labels)
    return write(out)


# ---- plots ----

def plot(draw: Callable[[Figure, dict[str, str]], None], alt: str, width: float = 3.9, height: float = 2.75) -> str:
    """`<picture>` with what `draw(figure, colours)` draws, as SVG for a light and for a dark page. Sizes in inches."""
    data = []
    for colours in (LIGHT, DARK):
        style = {"text.color": colours["ink"], "axes.edgecolor": colours["line"], "axes.labelcolor": colours["muted"],
                 "xtick.color": colours["line"], "xtick.labelcolor": colours["muted"], "ytick.color": colours["line"],
                 "ytick.labelcolor": colours["muted"], "axes.facecolor": "none",
                 "grid.color": colours["line"], "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
                 "axes.spines.right": False,
                 "font.size": 9, "axes.labelsize": 9, "legend.frameon": False, "legend.fontsize": 8.5,
                 "lines.linewidth": 1.8, "grid.linewidth": 0.7, "text.parse_math": False,
                 "svg.fonttype": "none", "svg.hashsalt": "kd"}  # text stays text; the same run gives the same bytes
        with matplotlib.style.context(["default", style]):  # whatever the user's matplotlibrc says
            figure, buffer = Figure(figsize=(width, height), layout="constrained"), io.StringIO()
            draw(figure, colours)
            figure.savefig(buffer, format="svg", transparent=True,
                           metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        # matplotlib lays out with its own font; the reader's own looks like the rest of the page
        svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", buffer.getvalue())
        data.append("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode())
    size = f'width="{round(96 * width)}" height="{round(96 * height)}"'
    return (f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data[1]}">'
            f'<img src="{data[0]}" alt="{escape(alt)}" {size}></picture>')


def curve(history: list[dict[str, Any]], key: str, percent: bool = False) -> Callable[[Figure, dict[str, str]], None]:
    """A drawing of one quantity over the epochs, a line a role; on accuracy a star marks the epoch that was kept."""
    def draw(figure: Figure, colours: dict[str, str]) -> None:
        axes: Axes = figure.subplots()
        for role in ROLES:
            entries = [entry for entry in history if entry["role"] == role]
            if not entries:
                continue
            epochs, values = [entry["epoch"] for entry in entries], [entry[key] for entry in entries]
            axes.plot(epochs, values, color=colours[role], label=role, linestyle=LINES[role],
                      marker="." if len(entries) < 3 else None)
            if percent:
                best = int(np.argmax(values))
                axes.plot(epochs[best], values[best], "*", color=colours[role], markersize=13, clip_on=False,
                          markeredgecolor=colours["ground"], markeredgewidth=0.8, zorder=4)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        else:
            axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    return draw


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and count of every bin that has samples."""
    confidence, right = np.exp(log_softmax(logits).max(1)), logits.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [(float(confidence[place == b].mean()), float(right[place == b].mean()), int((place == b).sum()))
            for b in range(bins) if (place == b).any()]


def reliability_plot(logits: np.ndarray, labels: np.ndarray, role: str) -> Callable[[Figure, dict[str, str]], None]:
    """Above, the share that is right by confidence; below, how many samples that is."""
    def draw(figure: Figure, colours: dict[str, str]) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        place, right, count = map(np.array, zip(*reliability(logits, labels), strict=True))
        middle = (np.minimum((place * BINS).astype(int), BINS - 1) + 0.5) / BINS
        # the fewer the samples, the fainter: their share could as well be another
        faint = [float(0.25 + 0.75 * min(1.0, n / 10)) for n in count]
        above.bar(middle, right, 0.9 / BINS, color=[(colours[role], alpha) for alpha in faint])
        above.plot([0, 1], [0, 1], color=colours["ink"], linestyle=":", linewidth=1.4, zorder=3)
        above.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="share that is right")
        below.bar(middle, count / count.sum(), 0.9 / BINS, color=colours["muted"])
        below.set(xlabel="confidence (the top probability)", ylabel="samples")
        below.yaxis.set_major_locator(MaxNLocator(2))
        for axis in (above.yaxis, below.xaxis, below.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
    return draw


def heat_map(shares: np.ndarray, role: str) -> Callable[[Figure, dict[str, str]], None]:
    def draw(figure: Figure, colours: dict[str, str]) -> None:
        axes: Axes = figure.subplots()
        axes.grid(False)
        axes.imshow(shares, vmin=0, vmax=1, interpolation="nearest",
                    cmap=LinearSegmentedColormap.from_list(role, [colours["panel"], colours[role]]))
        axes.set(xlabel="predicted class", ylabel="true class")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
    return draw


# ---- the parts of the page, each a string of HTML; every name from outside goes through escape ----

def photo(pixels: np.ndarray, alt: str, quality: int = 88) -> str:
    """`<img>` of `(H, W, 3)` uint8 as JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return (f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="{escape(alt)}" '
            f'width="{pixels.shape[1]}" height="{pixels.shape[0]}">')


def named(name: Any) -> str:
    """A name from outside, escaped, which may be broken after an underscore."""
    return escape(str(name)).replace("_", "_<wbr>")


def minus(number: str) -> str:
    """With the sign that is as wide as a plus."""
    return number.replace("-", "−")


def percent(share: float, sign: str = "") -> str:
    return minus(f"{round(100 * share, 1) + 0.0:{sign}.1f}")  # adding zero makes -0.0 positive


def tile(label: str, value: str, below: str, role: str = "") -> str:
    return f'<div class="tile {role}"><dt>{label}</dt><dd><b>{value}</b><span>{below}</span></dd></div>'


def tiles(result: dict[str, Any]) -> str:
    """The numbers that matter, large."""
    shown = [tile(role, f"{percent(result[role]['test_accuracy'])}<small> %</small>",
                  f"{result[role]['test_correct']} of {result[role]['test_total']} on test", role)
             for role in ROLES if role in result]
    if "control" in result:
        gain = result["student"]["test_correct"] - result["control"]["test_correct"]
        points = result["student"]["test_accuracy"] - result["control"]["test_accuracy"]
        shown.append(tile("the teacher’s gift", f"{percent(points, '+')}<small> points</small>",
                          minus(f"{gain:+d} of {result['student']['test_total']} images"), "gain"))
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def results_table(result: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><i class="dot {role}"></i>{role}<span>{named(row["model"])}</span></th>'
        f'<td>{percent(row["test_accuracy"])} %<span>{row["test_correct"]}/{row["test_total"]}</span></td>'
        f'<td>{row["test_macro_f1"]:.3f}</td><td>{row["params"]:,}</td></tr>'
        for role, row in ((role, result[role]) for role in ROLES if role in result))
    if "control" in result:
        student, control = result["student"], result["control"]
        rows += (f'<tr class="sum"><th scope="row">student − control</th>'
                 f'<td>{percent(student["test_accuracy"] - control["test_accuracy"], "+")} points'
                 f'<span>{minus(format(student["test_correct"] - control["test_correct"], "+d"))} images</span></td>'
                 f'<td>{minus(format(student["test_macro_f1"] - control["test_macro_f1"], "+.3f"))}</td>'
                 f'<td></td></tr>')
    return ('<div class="wide"><table id="results"><thead><tr><th scope="col">model</th><th scope="col">test accuracy'
            '</th><th scope="col">macro-F1</th><th scope="col">parameters</th></tr></thead>'
            f'<tbody>{rows}</tbody></table></div>')


def sign_test(first: int, second: int) -> float:
    """McNemar's exact test, two-sided: the chance of a split at least this uneven if both were as good."""
    few, total = min(first, second), first + second
    return min(1.0, 2 * sum(math.comb(total, i) for i in range(few + 1)) / 2 ** total)


def chance(kept: dict[str, np.ndarray]) -> str:
    """A sentence: could the gain be luck in the choice of test images?"""
    if "control" not in kept:
        return '<p class="note">Without <code>--control</code> nothing says what the teacher was worth.</p>'
    student, control = (kept[role].argmax(1) == kept["labels"] for role in ("student", "control"))
    ours, theirs = int((student & ~control).sum()), int((control & ~student).sum())
    return (f'<p class="note">{ours} test images only the student has right, {theirs} only the control: by chance '
            f'alone a split as uneven comes with probability {sign_test(ours, theirs):.2g} (McNemar’s exact test). '
            f'Another seed moves both models besides; <code>python -m kd report</code> compares runs.</p>')


def confusion(result: dict[str, Any], classes: list[str]) -> str:
    """A matrix a role: the true class down, the predicted one across, shaded by its share of the row."""
    parts = []
    for role in (role for role in ROLES if role in result):
        counts = np.array(result[role]["confusion"])
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        if len(classes) > TABLED:
            places = np.argwhere((counts > 0) & ~np.eye(len(classes), dtype=bool))
            often = sorted(map(tuple, places), key=lambda at: -counts[at])[:5]
            told = "".join(f"<li>{escape(classes[true])} taken for {escape(classes[taken])}: {counts[true, taken]}</li>"
                           for true, taken in often)
            body = plot(heat_map(shares, role), f"Confusion matrix of the {role} over {len(classes)} classes.",
                        3.4, 3.2) + f"<ul>{told}</ul>"
        else:
            head = "".join(f'<th scope="col" title="{escape(name)}">{i}</th>' for i, name in enumerate(classes, 1))
            rows = "".join(
                f'<tr><th scope="row"><em>{i + 1}</em> {named(name)}</th>' + "".join(
                    f'<td class="{"hit" if i == j else "miss" if count else "none"}" '
                    f'style="--share:{shares[i, j]:.3f}">{count}</td>' for j, count in enumerate(counts[i])) + "</tr>"
                for i, name in enumerate(classes))
            body = (f'<div class="wide"><table class="confusion {role}"><thead><tr><th scope="col">true ↓ predicted →'
                    f'</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
        parts.append(f'<div><h3><i class="dot {role}"></i>{role}</h3>{body}</div>')
    return f'<div class="grid">{"".join(parts)}</div>'


def short(name: str) -> str:
    """The end of a path is enough to know it by, and says nothing of the machine; result.json has the whole."""
    return "/".join(Path(name).parts[-2:]) if "/" in name else name


def error_card(kept: dict[str, np.ndarray], index: int, picture: np.ndarray, temperature: float) -> str:
    """One test image: what it is, and what teacher and student make of it, at T = 1 and as they are distilled."""
    classes, label = kept["classes"].tolist(), int(kept["labels"][index])
    columns = [np.exp(log_softmax(kept[role][index:index + 1] / t))[0]
               for role in ("teacher", "student") for t in dict.fromkeys((1.0, temperature))]
    picks = [int(kept[role][index].argmax()) for role in ("teacher", "student")]
    # what it is, what they took it for, and what the teacher thought of next
    rows = list(dict.fromkeys([label, *picks, *np.argsort(-columns[0], kind="stable")[:4].tolist()]))[:4]
    heads = ["1", f"{temperature:g}"] if temperature != 1 else ["1"]

    def cell(pick: int, row: int, share: float) -> str:
        kind = "" if row != pick else ' class="right"' if row == label else ' class="wrong"'
        return f"<td{kind}>{100 * share:.0f}</td>"

    body = "".join(
        f'<tr><th scope="row" class="{"true" if row == label else "other"}">{named(classes[row])}</th>' + "".join(
            cell(picks[i // len(heads)], row, column[row]) for i, column in enumerate(columns)) + "</tr>"
        for row in rows)
    taken = " and ".join(f"the {role} for {classes[pick]}" for role, pick in zip(("teacher", "student"), picks))
    head = "".join(f'<th scope="col">T={t}</th>' for t in heads) * 2
    alt = f"{short(str(kept['names'][index]))}: {classes[label]}, taken by {taken}"
    return (f'<figure class="card" data-sample="{index}">{photo(picture, alt)}<figcaption>'
            f'<b>{named(classes[label])}</b><span>{named(short(str(kept["names"][index])))}</span></figcaption>'
            f'<table><thead><tr><td class="name"></td><th scope="colgroup" colspan="{len(heads)}">teacher</th>'
            f'<th scope="colgroup" colspan="{len(heads)}">student</th></tr><tr><th scope="col">%</th>{head}</tr>'
            f'</thead><tbody>{body}</tbody></table></figure>')


def errors(kept: dict[str, np.ndarray], temperature: float) -> str:
    total = len(kept["labels"])
    pictures = dict(zip(kept["shown"].tolist(), kept["pictures"], strict=True))
    parts = []
    for title, numbers in zip(("The student is wrong, the teacher right", "The teacher is wrong, the student right",
                               "Both are wrong"), find_errors(kept["labels"], kept["teacher"], kept["student"]),
                              strict=True):
        cards = [error_card(kept, i, pictures[i], temperature) for i in numbers.tolist() if i in pictures]
        told = "all of them" if len(cards) == len(numbers) else f"the {len(cards)} surest mistakes"
        parts.append(f'<h3>{title}: {len(numbers)} of {total}</h3>'
                     + (f'<p class="note">Shown: {told}.</p><div class="cards">{"".join(cards)}</div>' if cards
                        else ""))
    return "".join(parts)


def sheet(kept: dict[str, np.ndarray], classes: list[str]) -> str:
    views = kept["views"]
    rows = []
    for sample, label in zip(views, kept["view_labels"].tolist(), strict=True):
        cells = "".join(photo(pixels, f"{classes[label]}, view {number} of a training sample", 90)
                        for number, pixels in enumerate(sample))
        rows.append(f'<figure><div>{cells}</div><figcaption>{named(classes[label])}</figcaption></figure>')
    return f'<div class="sheet v{views.shape[1]}">{"".join(rows)}</div>'


def time_parts(history: list[dict[str, Any]], total: float) -> list[tuple[str, float]]:
    """Where the seconds went; they sum to `total`.

    Evaluation and saving is what lies between two epochs of a role beyond the second's training; before the first epoch
    lies also what prepares it, so that one counts among the rest.
    """
    parts = [(f"{role}: {'fine-tuning' if role == 'teacher' else 'training'}", role,
              sum(entry["seconds"] for entry in history if entry["role"] == role)) for role in ROLES]
    between = [max(0.0, now["elapsed"] - before["elapsed"] - now["seconds"])
               for before, now in zip(history, history[1:])
               if now["role"] == before["role"] and "elapsed" in before and "elapsed" in now]
    known = [(name, seconds) for name, _, seconds in [*parts, ("evaluation and saving", "", sum(between))] if seconds]
    rest = max(0.0, total - sum(seconds for _, seconds in known))
    return [*known, ("the rest: decoding, the teacher’s logits, test", rest)]


def time_table(history: list[dict[str, Any]], total: float) -> str:
    parts = time_parts(history, total)
    kinds = [next((role for role in ROLES if name.startswith(role)), "other") for name, _ in parts]
    bar = "".join(f'<i class="{kind}" style="flex-grow:{seconds:.1f}"></i>'
                  for kind, (_, seconds) in zip(kinds, parts, strict=True))
    rows = "".join(f'<tr><th scope="row"><i class="dot {kind}"></i>{name}</th><td>{seconds:.0f} s</td>'
                   f'<td>{100 * seconds / total:.0f} %</td></tr>'
                   for kind, (name, seconds) in zip(kinds, parts, strict=True))
    return (f'<div class="bar" aria-hidden="true">{bar}</div><div class="wide"><table id="time"><tbody>{rows}'
            f'<tr class="sum"><th scope="row">in all</th><td>{total:.0f} s</td><td></td></tr></tbody></table></div>')


def settings(result: dict[str, Any]) -> str:
    def pairs(values: dict[str, Any]) -> str:
        return "".join(f'<tr><th scope="row">{escape(str(name))}</th><td>{named(short(str(value)))}</td></tr>'
                       for name, value in values.items())

    return (f'<details><summary>Settings</summary><div class="wide"><table class="plain"><tbody>'
            f'{pairs(result["config"])}</tbody></table></div></details>'
            f'<details><summary>Machine, versions, commit</summary><div class="wide"><table class="plain"><tbody>'
            f'{pairs({**result.get("environment", {}), "commit": result.get("commit") or "unknown"})}</tbody></table>'
            f'</div></details>')


CSS = """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; color-scheme: light dark }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 64px }
header p { margin: 0; color: var(--muted) }
header .eyebrow { font-size: 13px; letter-spacing: .04em }
h1 { font-size: clamp(26px, 5vw, 38px); line-height: 1.15; font-weight: 650; letter-spacing: -.02em;
  margin: 4px 0 8px }
h2 { font-size: 21px; font-weight: 650; letter-spacing: -.01em; margin: 56px 0 4px }
h3 { font-size: 15px; font-weight: 600; margin: 20px 0 6px }
p { max-width: 68ch; margin: 4px 0 12px }
.note, figcaption span { color: var(--muted); font-size: 14px }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, monospace }
small { font-size: .5em; font-weight: 500; letter-spacing: 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px;
  border-top: 3px solid var(--role, var(--ink)) }
.tile dt { color: var(--muted); font-size: 13px }
.tile dd { margin: 0 }
.tile b { display: block; font-size: 32px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em }
.tile span { color: var(--muted); font-size: 13px }
.teacher { --role: var(--teacher) } .control { --role: var(--control) } .student { --role: var(--student) }
.other { --role: var(--line) }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--role); margin-right: 8px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 15px }
th { font-weight: 500; text-align: left } td { text-align: right; white-space: nowrap }
#results, #time { width: 100%; max-width: 720px }
#results th, #results td, #time th, #time td { padding: 9px 0 9px 14px; border-bottom: 1px solid var(--line);
  vertical-align: top }
#results th:first-child, #time th:first-child { padding-left: 0 }
#results thead th { color: var(--muted); font-size: 13px; text-align: right; vertical-align: bottom;
  white-space: nowrap }
@media (max-width: 480px) { #results, #time { font-size: 14px } #results th, #results td { padding-left: 9px }
  #results thead th { font-size: 12px } }
#results thead th:first-child { text-align: left }
#results span { display: block; color: var(--muted); font-size: 13px; font-weight: 400 }
#results tbody th span { padding-left: 17px } .sum th, .sum td { font-weight: 650; border-bottom: 0 !important }
#time td { white-space: nowrap }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(310px, 100%), 1fr)); gap: 12px 28px }
.grid > div { min-width: 0 }
picture img { display: block; width: 100%; max-width: 430px; height: auto }
.confusion { border-spacing: 3px; border-collapse: separate; font-size: 14px; margin-left: -3px }
.confusion th { padding: 4px 10px 4px 0 } .confusion em { color: var(--muted); font-style: normal }
.confusion thead th { color: var(--muted); font-size: 12px; text-align: center; padding: 0; font-weight: 400 }
.confusion thead th:first-child { text-align: left; padding-right: 10px }
.confusion td { min-width: 46px; height: 42px; text-align: center; border-radius: 6px; position: relative;
  z-index: 0; border: 1px solid var(--line) }
.confusion td::before { content: ""; position: absolute; inset: 0; z-index: -1; border-radius: 5px;
  background: var(--role); opacity: calc(var(--share) * .5) }
.confusion .miss::before { background: var(--wrong); opacity: calc(.08 + var(--share) * .6) }
.confusion .none { color: var(--muted); opacity: .6 } .confusion .hit { font-weight: 650 }
ul { padding-left: 20px; font-size: 14px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 12px }
.card { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 12px;
  display: grid; grid-template-columns: 96px minmax(0, 1fr); gap: 2px 12px; align-content: start; align-items: start }
.card img { width: 96px; height: auto; border-radius: 6px; grid-row: 1 / 3; display: block }
.card figcaption { line-height: 1.3 } .card figcaption span { display: block; font-size: 12px }
.card table { font-size: 12.5px; width: 100%; line-height: 1.35; table-layout: fixed }
.card th:not([colspan]):not(:first-child) { width: 32px; white-space: nowrap } .card .name { width: auto }
.card td, .card th { padding: 1.5px 0 1.5px 5px; font-weight: 400 } .card th:first-child { padding-left: 0 }
.card thead th { color: var(--muted); text-align: right; font-size: 11.5px }
.card thead tr + tr th:first-child { text-align: left } .card [colspan] { width: 64px } .card .true { font-weight: 650 }
.card .right, .card .wrong { font-weight: 700; border-radius: 3px }
.card .right { color: var(--student) } .card .wrong { color: var(--wrong) }
.sheet { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 14px 28px }
.sheet.v1 { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: 14px }
.sheet figure { margin: 0; min-width: 0 } .sheet figcaption { font-size: 13px; color: var(--muted) }
.sheet figure div { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 4px }
.sheet img { width: 100%; height: auto; display: block; border-radius: 4px }
.bar { display: flex; gap: 2px; height: 14px; max-width: 720px; margin: 12px 0 4px; border-radius: 7px;
  overflow: hidden }
.bar i { background: var(--role); flex-basis: 0 }
details { border-top: 1px solid var(--line); padding: 12px 0 } summary { cursor: pointer; font-weight: 600 }
.plain { font-size: 14px; margin-top: 8px } .plain th { color: var(--muted); padding-right: 20px; vertical-align: top }
.plain td { text-align: left; white-space: normal }
"""


def render(result: dict[str, Any], history: list[dict[str, Any]], kept: dict[str, np.ndarray]) -> str:
    """The whole page, from what result.json, metrics.jsonl and predictions.npz hold."""
    config, classes = result["config"], kept["classes"].tolist()
    roles = [role for role in ROLES if role in kept and role in result]
    temperature, student = float(config["temperature"]), result["student"]["model"]
    title = f"{student} learns from {result['teacher']['model']}"
    setting = (f"{short(str(config['dataset']))}, {config['size']} px, {config['epochs']} epochs, T = {temperature:g}, "
               f"λ = {config['kd_weight']:g}, seed {config['seed']}")
    trained = [entry for entry in history if entry["role"] in roles]
    best = ", ".join(f"{role} {percent(result[role]['validation_accuracy'])} %" for role in roles)
    calibration = ""
    for role in roles:
        error = f"ECE {result[role]['calibration_error']:.3f}"
        drawn = plot(reliability_plot(kept[role], kept["labels"], role), f"Reliability of the {role}: {error}.", 3.9,
                     3.4)
        calibration += f'<div><h3><i class="dot {role}"></i>{role}, {error}</h3>{drawn}</div>'
    variables = ["".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK)]
    views = kept["views"].shape[1]
    curves = "".join(f"<div><h3>{name}</h3>{plot(curve(trained, key, key == 'accuracy'), alt)}</div>"
                     for name, key, alt in (
                         ("Validation accuracy", "accuracy", f"Validation accuracy by epoch; best: {best}."),
                         ("Validation loss, cross-entropy", "loss", "Cross-entropy on validation by epoch."),
                         ("Training loss", "train_loss", "Training loss by epoch.")))
    sections = [
        ("Results", results_table(result) + chance(kept)),
        ("Curves",
         "<p>By epoch. A star marks the weights that were kept: the best by validation accuracy. The student’s "
         "training loss holds the teacher’s share, λT²·KL, and compares with no other.</p>"
         f'<div class="grid">{curves}</div>'),
        ("Confusion", "<p>Test images by true class (down) and predicted class (across), shaded by the share of the "
         "true class.</p>" + confusion(result, classes)),
        ("Calibration", f"<p>How often a model is right when it claims to be that sure; on the dotted line it keeps "
         f'its word. ECE is the mean distance from it, the expected calibration error. Bars of fewer than ten test '
         f'images are fainter.</p><div class="grid">{calibration}</div>'),
        ("Where teacher and student fail", "<p>Test images with the true class and the probabilities, in percent, that "
         "each gives as it predicts (T = 1) and as it teaches or learns (T = "
         f"{temperature:g}).</p>" + errors(kept, temperature)),
        ("What the student sees", f"<p>{'Views' if views > 1 else 'The one view'} of training samples under "
         f"<code>--augment {escape(str(config['augment']))}</code>, the very pixels of training but for JPEG.</p>"
         + sheet(kept, classes)),
        ("Time", f"<p>{result['images_per_second']:.0f} images/s in the student’s median epoch.</p>"
         + time_table(trained, float(result["seconds"]))),
        ("How it was made", settings(result)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}: {percent(result["student"]["test_accuracy"])} %</title>
<link rel="icon" href="data:,">
<style>
:root {{ {variables[0]} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables[1]} }} }}{CSS}</style>
</head>
<body>
<main>
<header><p class="eyebrow">Knowledge distillation</p><h1>{named(title)}</h1><p>{escape(setting)}</p></header>
{tiles(result)}
{body}</main>
</body>
</html>
"""


def write(out: Path) -> Path:
    """Draw `out`/report.html from the run's files. Raises BadInput where one is absent or broken."""
    result, kept, path = read_result(out), read_predictions(out / PREDICTIONS), out / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable ({error}); give the folder of a run that has ended") from error
    write_atomic(out / PAGE, render(result, history, kept).encode())
    return out / PAGE


def main(argv: list[str]) -> None:
    parser = cli.OneLineParser(prog="python -m kd page", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run that has ended")
    for run in parser.parse_args(argv).runs:
        print(write(Path(run)))
