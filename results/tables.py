"""The tables and figures of README.md and results/README.md, made from the files of this folder.

    python -m results.tables        write each table between its two comments, and draw the figures

They come from the folders `beans-96-*`, which hold runs, and from the lines of `*/runs.jsonl` (`results/keep.py`). A
line of search.jsonl or times.jsonl is one run: its settings, its commit, and its figures on validation by epoch.
"""

import fnmatch
import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

from kd.scores import mcnemar_p
from kd.tools import plots, report
from kd.tools.predictions import read_predictions
from results.experiments import EXPERIMENTS, METHODS
from results.keep import HERE, labels_and_right, read_lines, read_runs

TRAINING_PICTURES = 1034    # in the training split of beans
LAST_EPOCHS = 5             # their mean is shown: the 133 pictures of validation say little about one epoch
NAMES = {"beans": "beans", "caltech101": "Caltech-101"}
ROLE_HEAD = ["teacher", "control", "student", "student − control"]

# what the README shows: a folder of runs, and the recipe that made them
SUMMARY = {"beans-96-tutorial": "`tutorial` at 96 px, 30 epochs", "beans-96-crop-30": "`best --epochs 30`",
           "beans-96-best": "`best`, 200 epochs"}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


# ---- the test pictures that a role had right -------------------------------------------------------------

Hits = dict[int, np.ndarray]    # by seed: 1 for each picture that a role had right, else 0; `(N,)`


def hits_of(name: str, role: str = "student", by_class: bool = False) -> Hits:
    """What a role had right in the runs of an experiment; {} for none.

    Beans has 128 test pictures only, so those of validation are counted with them.
    by_class: each picture has a weight, 1 on average, that gives every class the same sum. So the mean is the mean
    recall over the classes.
    """
    hits = {}
    for seed, run in read_runs(name).items():
        splits = ("validation", "test") if run["arm"].startswith("beans") else ("test",)
        labels, right = map(np.concatenate, zip(*(labels_and_right(run, role, split) for split in splits)))
        if by_class:
            _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
            right = right * (len(labels) / (len(counts) * counts[places]))
        hits[seed] = right
    return hits


def hits_in_folder(name: str) -> list[Hits]:
    """The same of a folder of runs, by role, on test alone."""
    runs = [read_predictions(file) for file in sorted((HERE / name).glob("seed-*/predictions.npz"))]
    return [{seed: run.correct(role).astype(np.int64) for seed, run in enumerate(runs) if role in run.logits}
            for role in report.ROLES]


def accuracy_cell(hits: Hits) -> str:
    """`62.3 ± 1.4 %`."""
    return f"{report.format_mean(report.mean_and_sd([right.mean() for right in hits.values()]))} %"


def difference(ours: Hits, theirs: Hits, level: float = 0.95) -> dict[str, Any] | None:
    """ours − theirs over the seeds that both have: n, mean, sd, and the interval over runs and pictures.

    None for fewer than three seeds.
    """
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(gains) < 3:
        return None
    return {**report.mean_and_sd([gain.mean() for gain in gains]),
            "interval": report.gain_interval(np.stack(gains), level)}


def gain_cell(ours: Hits, theirs: Hits) -> str:
    """`+3.4 ± 5.6 points (-3.8 to +10.8)`: mean, deviation and 95 % interval of a difference; empty for none."""
    gain = difference(ours, theirs)
    return f"{report.format_mean(gain, '+')} points {interval_cell(gain['interval'])}" if gain else ""


def interval_cell(interval: Sequence[float]) -> str:
    """`(-3.8 to +10.8)`, in points."""
    low, high = interval
    return f"({100 * low:+.1f} to {100 * high:+.1f})"


def role_cells(name: str, by_class: bool = False) -> list[str]:
    """n, the accuracies of teacher, control and student, and the gain."""
    teacher, control, student = (hits_of(name, role, by_class) for role in report.ROLES)
    return [str(len(student)), *map(accuracy_cell, (teacher, control, student)), gain_cell(student, control)]


def parts_of(name: str) -> list[str]:
    """few/caltech101-505-all: "Caltech-101", "505", "all"."""
    data, *parts = name.split("/")[1].split("-", 2)
    return [NAMES[data], *parts]


# ---- the recipes on beans ----------------------------------------------------------------------------

def results_table() -> str:
    """A row for every folder of runs, with the count of correct test pictures of each run."""
    rows = []
    for folder in sorted(HERE.glob("beans-96-*")):
        by_role = hits_in_folder(folder.name)
        cells = []
        for hits in by_role:
            counts = [str(right.sum()) for right in hits.values()]
            counts = counts[:1] if len(set(counts)) == 1 else counts    # one teacher for all runs
            cells.append(f"{accuracy_cell(hits)} ({', '.join(counts)} of {len(hits[0])})" if hits else "")
        _, control, student = by_role
        rows.append([f"`{folder.name}`", str(len(student)), *cells, gain_cell(student, control)])
    return markdown(["runs", "n", *ROLE_HEAD], rows)


def summary_table() -> str:
    """The three rows of the README."""
    rows = []
    for name, recipe in SUMMARY.items():
        teacher, control, student = hits_in_folder(name)
        rows.append([recipe, accuracy_cell({0: teacher[0]}), accuracy_cell(control), accuracy_cell(student),
                     gain_cell(student, control)])
    return markdown(["recipe", *ROLE_HEAD], rows)


def search_table() -> str:
    """A row for all runs that differ only in their seed, best student first.

    It shows the settings that differ from most rows, the number of runs, and for each role the mean of the last
    epochs' accuracy on validation, in %, and loss.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(HERE / "search.jsonl"):
        groups.setdefault(json.dumps(report.deciding(line["config"])), []).append(line)
    differing = report.differing([json.loads(settings) for settings in groups])

    rows = []
    for number, group in enumerate(groups.values()):
        changes = [f"{name} {values[number]}" for name, values in differing.items()
                   if values[number] != statistics.mode(values)]
        cells = [", ".join(changes) or "nothing", str(len(group))]
        for role in ("control", "student"):
            lines = [line[role] for line in group if role in line]
            accuracy, loss = (np.mean([line[key][-LAST_EPOCHS:] for line in lines] or 0)
                              for key in ("accuracy", "loss"))
            cells.append(f"{100 * accuracy:.1f} % ({loss:.3f})" if lines else "")
        rows.append((accuracy, cells))
    return markdown(["changed", "n", "control", "student"], [cells for _, cells in sorted(rows, reverse=True)])


def times_table() -> str:
    """A row for each run: when its student first reached each goal on validation, in seconds after its imports.

    compare.json is what `python -m kd bench compare --json` printed. The tutorial's seconds are computed from it: its
    epochs at the rate of the tutorial's loop.
    """
    rates = json.loads((HERE / "compare.json").read_text("utf-8"))
    rows = []
    for line in read_lines(HERE / "times.jsonl"):
        config, student = line["config"], line["student"]
        name, rate, seconds = "`best`", statistics.median(student["images_per_second"]), student["elapsed"]
        if config["size"] == rates["size"]:
            name, rate = "`tutorial`, in its own loop", rates["tutorial_img_s"]
            seconds = [(epoch + 1) * TRAINING_PICTURES / rate for epoch in range(config["epochs"])]
        reached = [next((f"{spent:.0f} s" for accuracy, spent in zip(student["accuracy"], seconds, strict=True)
                         if accuracy >= goal), "never") for goal in (0.72, 0.85)]
        rows.append([name, *(str(config[key]) for key in ("size", "epochs", "seed")), f"{rate:.1f}", *reached,
                     f"{seconds[-1]:.0f} s"])
    return markdown(["recipe", "size", "epochs", "seed", "images/s", "72 % after", "85 % after", "all epochs"], rows)


def folds_table() -> str:
    """Each picture of beans once: counts over all folds, and the gain with its interval over the pictures."""
    rows = []
    for name in fnmatch.filter(EXPERIMENTS, "folds/*"):
        augment, epochs = name.removeprefix("folds/").rsplit("-", 1)
        teacher, control, student = (np.concatenate(list(hits_of(name, role).values())) for role in report.ROLES)
        gains = student - control
        p = mcnemar_p(int((gains > 0).sum()), int((gains < 0).sum()))
        interval = interval_cell(report.gain_interval(gains[None]))
        rows.append([epochs, f"`{augment}`", str(len(gains)),
                     *(f"{100 * right.mean():.1f} % ({right.sum()})" for right in (teacher, control, student)),
                     f"{100 * gains.mean():+.1f} points {interval}, p = {p:.2g}"])
    return markdown(["epochs", "teacher's views", "pictures", *ROLE_HEAD], rows)


# ---- few labels --------------------------------------------------------------------------------------

def labels_table(arm: str, by_class: bool = False) -> str:
    """A row for each number of labels. by_class: every class counts alike, however many pictures it has."""
    rows = [[*parts_of(name)[:2], *role_cells(name, by_class)] for name in fnmatch.filter(EXPERIMENTS, f"few/*-{arm}")]
    return markdown(["data", "labels", "n", *ROLE_HEAD], rows)


# what the difference is called, and the two arms
PARTS = [
    ("label smoothing − control", "smoothing", "control"),
    ("KD on the labelled pictures − control", "labelled", "control"),
    ("KD on all pictures − on the labelled ones", "all", "labelled"),
    ("the teacher's hard labels on all − control", "hard", "control"),
    ("KD on all − the teacher's hard labels on all", "all", "hard"),
    ("self-training by the control − control", "self", "control"),
    ("KD on all − self-training by the control", "all", "self"),
    ("a MobileNetV2 from ImageNet as teacher − the control as teacher", "imagenet", "self"),
    ("KD on all − a MobileNetV2 from ImageNet as teacher", "all", "imagenet"),
]


def parts_table() -> str:
    """What the gain is made of: differences between two arms."""
    def hits(column: str, arm: str) -> Hits:
        return hits_of(f"{column}-all", "control") if arm == "control" else hits_of(f"{column}-{arm}")

    columns = ["few/beans-60", "few/caltech101-505"]
    rows = []
    for label, first, second in PARTS:
        pairs = [(hits(column, first), hits(column, second)) for column in columns]
        rows.append([label, *(f"{gain_cell(*pair)}, n = {min(map(len, pair))}" for pair in pairs)])
    return markdown(["difference", *(f"{', '.join(parts_of(column))} labels" for column in columns)], rows)


def patience_table() -> str:
    """The same labels in more steps, for student and control alike."""
    arms = {"1 ×": "all", "3 ×": "patient-3", "10 ×": "patient-10"}
    return markdown(["data", "labels", "steps", "n", *ROLE_HEAD],
                    [["beans", "60", steps, *role_cells(f"few/beans-60-{arm}")] for steps, arm in arms.items()])


def wrong_table() -> str:
    """All labels, of which some are wrong: the control has λ = 0."""
    rows = []
    for name in fnmatch.filter(EXPERIMENTS, "few/*-wrong-?0"):
        data, _, percent = parts_of(name)
        n, teacher, control, student, gain = role_cells(name)
        half = hits_of(f"{name}-half")
        rows.append([data, f"{percent} %", n, teacher, control, accuracy_cell(half), student,
                     gain_cell(half, hits_of(name, "control")), gain])
    return markdown(["data", "wrong", "n", "teacher", "λ = 0", "λ = 0.5", "λ = 1", "λ = 0.5 − λ = 0", "λ = 1 − λ = 0"],
                    rows)


# ---- the methods -------------------------------------------------------------------------------------

def methods_table(prefix: str = "") -> str:
    """A row for each method, with its flags: accuracy, also by class, and what it is over others.

    A star marks a difference whose interval excludes zero even at the level that allows for as many comparisons as
    there are methods (Bonferroni).
    prefix: what stands before a method's name in that of its experiment.
    """
    def over(name: str, other: str) -> str:
        if name in ("control", other):
            return ""
        strict = difference(hits[name], hits[other], level=1 - 0.05 / len(METHODS))
        return gain_cell(hits[name], hits[other]) + (" *" if strict and np.prod(strict["interval"]) > 0 else "")

    shown = {"control": "", **{name: f"`{flags} {best}`" for name, (flags, _, best) in METHODS.items()}}
    hits = {name: hits_of(f"methods/{prefix}{name}") for name in shown}
    rows = [[name, shown[name], str(len(hits[name])), accuracy_cell(hits[name]),
             accuracy_cell(hits_of(f"methods/{prefix}{name}", by_class=True)), over(name, "control"), over(name, "kd")]
            for name in shown if hits[name]]
    return markdown(["method", "flags", "n", "accuracy", "mean per class", "over the control", "over kd"], rows)


def steps_table() -> str:
    """What each method costs: milliseconds of a step, that over the control's, and bytes kept of a view."""
    rows = []
    for name, row in json.loads((HERE / "methods" / "steps.json").read_text("utf-8"))["methods"].items():
        low, high = row["times_95"]
        times = f"{row['times']:.2f} × ({low:.2f} to {high:.2f})" if name != "control" else ""
        rows.append([name, f"{row['milliseconds']:.0f} ms", times, f"{row['bytes']:,}"])
    return markdown(["method", "step", "times the control's", "bytes a view"], rows)


def tuning_table() -> str:
    """What each method was tuned by: accuracy on validation of three values."""
    rows = []
    for name, (flags, values, _) in sorted(METHODS.items()):
        shares = [f"{value}: {100 * run['student']['validation_accuracy']:.1f} %" for value in values.split()
                  for run in read_runs(f"methods/tune-{name}-{value}").values()]
        rows.append([name, f"`{flags.split()[-1]}`", ", ".join(shares)])
    return markdown(["method", "setting", "accuracy on validation"], rows)


# ---- figures -----------------------------------------------------------------------------------------

def draw_few(file: Path) -> None:
    """Accuracy against the number of labels, a panel for each data set: a dot is a run, a line joins the means."""
    with plots.drawing(file, (7, 2.8), len(NAMES)) as panels:
        for axes, (data, title) in zip(panels, NAMES.items(), strict=True):
            names = {int(parts_of(name)[1]): name for name in fnmatch.filter(EXPERIMENTS, f"few/{data}-*-all")}
            for role, colour in plots.COLOURS.items():
                shares = [[100 * right.mean() for right in hits_of(name, role).values()] for name in names.values()]
                for labels, values in zip(names, shares):
                    axes.plot([labels] * len(values), values, "o", color=colour, alpha=0.5, ms=4, mew=0)
                axes.plot(list(names), list(map(np.mean, shares)), "-", color=colour, label=role)
            axes.set(title=title, xlabel="labels", xscale="log", ylabel="accuracy, %")
            axes.set(xticks=list(names), xticklabels=list(names))
            axes.minorticks_off()
        panels[0].legend(frameon=False)


def draw_forest(file: Path) -> None:
    """The gain of each method over the control, with its interval."""
    control = hits_of("methods/control")
    gains = {name: gain for name in METHODS if (gain := difference(hits_of(f"methods/{name}"), control))}
    means = 100 * np.array([gain["mean"] for gain in gains.values()])
    ends = 100 * np.transpose([gain["interval"] for gain in gains.values()])
    with plots.drawing(file, (7, 0.9 + 0.3 * len(gains))) as (axes,):
        axes.errorbar(means, list(gains), xerr=abs(ends - means), fmt="o", color=plots.COLOURS["student"])
        axes.axvline(0, color=plots.COLOURS["control"], lw=1)
        axes.set(xlabel="test accuracy over the control, points", ylim=(len(gains) - 0.5, -0.5))


# ---- all of them -------------------------------------------------------------------------------------

# by the name that its comments in the documents have
TABLES: dict[str, Callable[[], str]] = {
    "summary": summary_table, "results": results_table, "folds": folds_table, "times": times_table,
    "search": search_table, "few": partial(labels_table, "all"),
    "by class": partial(labels_table, "all", by_class=True), "parts": parts_table, "patience": patience_table,
    "wrong": wrong_table, "pretrained": partial(labels_table, "pretrained"), "methods": methods_table,
    "methods on beans": partial(methods_table, "beans-"), "tuning": tuning_table, "steps": steps_table}
FIGURES = {"few": draw_few, "methods": draw_forest}
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")


def with_table(document: str, name: str, table: str) -> str:
    """The document with that table between its comments `name: ...` and `/name`, where it has them."""
    return re.sub(rf"(<!-- {name}: [^>]* -->\n).*(\n<!-- /{name} -->)", lambda found: found[1] + table + found[2],
                  document, flags=re.DOTALL)


if __name__ == "__main__":
    for name, make in TABLES.items():
        table = make()
        for path in DOCUMENTS:
            path.write_text(with_table(path.read_text("utf-8"), name, table), "utf-8")
    for name, draw in FIGURES.items():
        draw(HERE / f"{name}.svg")
