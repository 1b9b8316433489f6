"""Runs beside each other, from their result.json: `python -m kd report RUN RUN ... [--json] [--figure FILE.svg]`.

Runs that differ only in the seed are a group, which has means ± sample standard deviations. Differences are taken
within each run: student and control start from the same weights and see the same views in the same order, so that
what a seed gives to both cancels.
"""

import contextlib
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd import BadInput
from kd.scores import SIGNIFICANCE, bootstrap_interval, mcnemar_p
from kd.tools import arguments, predictions
from kd.tools.predictions import ROLES, read_predictions

COLOURS = {"teacher": "#a8650a", "control": "#8b867d", "student": "#0d6f8a"}  # the colour-blind can tell them apart

# Settings that do not affect the result. A recipe is only a name for the others.
NOT_DECIDING = {"seed", "recipe", "out", "resume", "overwrite", "cache_dir", "save_minutes", "push_to_hub", "push",
                "private", "quiet", "control", "allow_weak_teacher", "follow_links"}


# ---- what a run left ------------------------------------------------------------------------------

def read_result(run: Path) -> dict[str, Any]:
    """What result.json holds. run: the folder of a run, or the file itself. Raises BadInput where it is none."""
    path = run / "result.json" if run.is_dir() else run
    try:
        result = json.loads(path.read_text("utf-8"))
        _check_result(result)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a run that has ended") from error
    except ValueError as error:  # broken JSON, bytes that are no text, a number that is none
        raise BadInput(f"{path}: not readable as a result ({error}); give the folder of a run") from error
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a run's result (lacks {error}); give the folder of a run") from error
    return result


def _check_result(result: Any) -> None:
    """Look up everything that the tools need. Raises KeyError, TypeError or ValueError."""
    if not isinstance(result, dict):
        raise KeyError("an object")
    for role in ROLES:
        if role in result or role != "control":
            row = result[role]
            int(row["test_correct"]), int(row["test_total"]), int(row["params"]), float(row["test_accuracy"])
    result["config"]["seed"], float(result["seconds"]), float(result["images_per_second"])
    if "gain" in result:  # older results have none
        float(result["gain"]["p"])


class ByImage(NamedTuple):
    """The N test images of a run, and its gain on each."""

    images: list[tuple[str, str]]   # N: the name below their common folder, and the class
    gains: np.ndarray | None        # (N,) int64: 1 where only the student is right, -1 where only its control, else 0


def read_by_image(run: Path, result: dict[str, Any]) -> ByImage | None:
    """What predictions.npz says of each test image; None where there is no such file. `gains` need a control.

    run: as for `read_result`.
    """
    file = (run if run.is_dir() else run.parent) / predictions.FILE
    if not file.exists():
        return None
    content = read_predictions(file)
    classes = (content.classes[label] for label in content.labels)
    gains = None
    if "control" in result:
        gains = content.correct("student").astype(np.int64) - content.correct("control").astype(np.int64)
    return ByImage(list(zip(below_common_folder(content.names), classes, strict=True)), gains)


def below_common_folder(names: list[str]) -> list[str]:
    """The names without the folder that all of them have in common, so that copies of a data set are alike."""
    parts = [name.split("/") for name in names]
    shared = len(os.path.commonprefix([folders[:-1] for folders in parts]))     # also of lists, a part at a time
    return ["/".join(each[shared:]) for each in parts]


# ---- runs and groups ------------------------------------------------------------------------------

def compare(results: dict[str, dict[str, Any]], by_image: dict[str, ByImage | None]) -> dict[str, Any]:
    """The runs, the groups that they make, and the settings in which the groups differ; ready for JSON.

    results: result.json by the name of the run; by_image: `read_by_image` by the name of the run.
    """
    rows = [run_row(name, result, by_image[name]) for name, result in results.items()]
    settings = {name: deciding(result["config"]) for name, result in results.items()}
    members: dict[str, list[str]] = {}
    for name in results:
        members.setdefault(json.dumps(settings[name], sort_keys=True), []).append(name)

    groups = []
    for number, names in enumerate(members.values(), 1):
        group_rows = [row for row in rows if row["run"] in names]
        for row in group_rows:
            row["group"] = number
        group = group_row(number, group_rows, [by_image[name] for name in names])
        if any(results[name].get("environment") != results[names[0]].get("environment") for name in names):
            group["notes"].append("made by different machines or versions")
        groups.append(group)

    return {"runs": rows, "groups": groups, "differ": differing([settings[names[0]] for names in members.values()])}


def run_row(name: str, result: dict[str, Any], by_image: ByImage | None) -> dict[str, Any]:
    """One run, its accuracies as shares with their counts.

    `gain` is student − control, and `headroom` teacher − control; both are None without a control. `p` is that of
    McNemar's exact test for the gain, or None where it is not available.
    """
    row: dict[str, Any] = {"run": name, "seed": result["config"]["seed"], "gain": None, "headroom": None, "p": None}
    for role in ROLES:
        if role in result:
            row[role] = {key: result[role][f"test_{key}"] for key in ("accuracy", "correct", "total")}
            row[role]["params"] = result[role]["params"]

    if "control" in row:
        row["gain"] = row["student"]["accuracy"] - row["control"]["accuracy"]
        row["headroom"] = row["teacher"]["accuracy"] - row["control"]["accuracy"]
        if by_image and by_image.gains is not None:
            row["p"] = mcnemar_p(int((by_image.gains > 0).sum()), int((by_image.gains < 0).sum()))
        elif "gain" in result:
            row["p"] = result["gain"]["p"]
    return {**row, "seconds": result["seconds"], "images_per_second": result["images_per_second"],
            "commit": result.get("commit")}


def group_row(number: int, rows: list[dict[str, Any]], by_image: list[ByImage | None]) -> dict[str, Any]:
    """Means and deviations of the runs of a group.

    Their gain has an interval where all of them have predictions, of the same test images.
    """
    group: dict[str, Any] = {"group": number, "n": len(rows), "runs": [row["run"] for row in rows],
                             "seeds": [row["seed"] for row in rows], "notes": []}
    for role in ROLES:
        group[role] = mean_and_sd([row[role]["accuracy"] for row in rows if role in row])
    for difference in ("gain", "headroom"):
        group[difference] = mean_and_sd([row[difference] for row in rows if row[difference] is not None])

    read = [each for each in by_image if each]
    totals = {row["student"]["total"] for row in rows}
    if len(totals) > 1 or any(each.images != read[0].images for each in read):
        group["notes"].append("test pictures differ: no interval, and means over different pictures")
    else:
        gains = [each.gains for each in read if each.gains is not None]
        if len(gains) == len(rows) > 1:
            group["gain"]["interval"] = gain_interval(np.stack(gains))

    if len(set(group["seeds"])) < len(rows):
        group["notes"].append("a seed occurs twice: the spread is that of fewer runs than n")
    if any(row["commit"] != rows[0]["commit"] for row in rows):
        group["notes"].append("made by different commits")
    return group


def gain_interval(gains: np.ndarray, level: float = 0.95) -> list[float]:
    """The interval of the mean of `(runs, images)`, at that level. Runs and images are both drawn again.

    Images are drawn for all runs at once, because the test split is the same for all: what makes an image hard is no
    noise of one run.
    """
    def means(run_counts: np.ndarray, image_counts: np.ndarray) -> np.ndarray:
        sums = image_counts @ gains.T.astype(np.float64)    # (draws, runs)
        return (sums * run_counts).sum(axis=1) / gains.size

    return bootstrap_interval(means, *gains.shape, level=level)


def mean_and_sd(values: list[float]) -> dict[str, Any]:
    """n, mean (None for no value) and sample standard deviation (n - 1; None for fewer than two values)."""
    return {"n": len(values), "mean": statistics.fmean(values) if values else None,
            "sd": statistics.stdev(values) if len(values) > 1 else None}


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that affect the result, except the seed. The runs of a group have them in common.

    A run of a version that has other settings is in another group.
    """
    return {setting: value for setting, value in config.items() if setting not in NOT_DECIDING}


def differing(settings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all of `settings`, each with its values in their order."""
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name) for each in settings] for name in names}
    return {name: column for name, column in values.items() if any(value != column[0] for value in column)}


# ---- text and figure --------------------------------------------------------------------------------

def format_text(compared: dict[str, Any]) -> str:
    """The result of `compare` as tables."""
    runs, groups, differ = compared["runs"], compared["groups"], compared["differ"]

    head = ["run", "group", "seed", *(f"{role} %" for role in ROLES), "student - control", "parameters", "seconds",
            "images/s"]
    lines = aligned([head, *map(_run_cells, runs)])
    if any(row["p"] is not None for row in runs):
        lines.append(f"p: exact McNemar test of student against control; above {SIGNIFICANCE} the difference is "
                     f"within chance")

    lines += ["", "mean ± sample standard deviation over the runs of a group, in %; differences are taken within each "
              "run, in points"]
    lines += aligned([["group", "n", "seeds", *ROLES, "student - control", "headroom (teacher - control)"],
                      *map(_group_cells, groups)])
    for group in groups:
        if "interval" in group["gain"]:
            low, high = (100 * limit for limit in group["gain"]["interval"])
            lines.append(f"group {group['group']}: gain from the teacher (student - control) "
                         f"{format_mean(group['gain'], '+')} points, 95 % interval {low:+.1f} to {high:+.1f} "
                         f"(bootstrap over runs and test images)")
    lines += [f"note: group {group['group']}: {note}" for group in groups for note in group["notes"]]

    if differ:
        head = ["settings that differ", *(f"group {group['group']}" for group in groups)]
        cells = [[setting, *("-" if value is None else str(value) for value in values)]
                 for setting, values in differ.items()]
        lines += ["", *aligned([head, *cells])]
    elif len(runs) > 1:
        lines += ["", "the runs differ in nothing but the seed"]
    return "\n".join(lines)


def _run_cells(row: dict[str, Any]) -> list[str]:
    accuracies = [f"{100 * row[role]['accuracy']:.1f} ({row[role]['correct']}/{row[role]['total']})"
                  if role in row else "-" for role in ROLES]
    gain = "-"
    if row["gain"] is not None:
        images = row["student"]["correct"] - row["control"]["correct"]
        p = "" if row["p"] is None else f", p = {row['p']:.2g}"
        gain = f"{100 * row['gain']:+.1f} ({images:+d}{p})"
    return [row["run"], str(row["group"]), str(row["seed"]), *accuracies, gain, f"{row['student']['params']:,}",
            f"{row['seconds']:.0f}", f"{row['images_per_second']:.1f}"]


def _group_cells(group: dict[str, Any]) -> list[str]:
    differences = []
    for difference in (group["gain"], group["headroom"]):
        fewer = f" (n = {difference['n']})" if 0 < difference["n"] < group["n"] else ""
        differences.append(format_mean(difference, "+") + fewer)
    return [str(group["group"]), str(group["n"]), ",".join(map(str, group["seeds"])),
            *(format_mean(group[role]) for role in ROLES), *differences]


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns of cells: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
                      ).rstrip() for line in lines]


def format_mean(values: dict[str, Any], sign: str = "") -> str:
    """`62.3 ± 1.4`, in percent, from `mean_and_sd` of shares; only the mean of one value, a dash for none."""
    if values["mean"] is None:
        return "-"
    mean = f"{round(100 * values['mean'], 1) + 0.0:{sign}.1f}"  # adding zero makes -0.0 positive
    return mean if values["sd"] is None else f"{mean} ± {100 * values['sd']:.1f}"


@contextlib.contextmanager
def drawing(file: Path, size: tuple[float, float], panels: int = 1) -> Iterator[list[Any]]:
    """A new figure of that size in inches, as the axes of its panels, which is written to `file` in the end.

    The ending of `file` decides the format: svg, png or pdf. Raises BadInput where it cannot be written.
    """
    from matplotlib import rc_context  # takes half a second to import, which only figures need
    from matplotlib.figure import Figure
    with rc_context({"svg.hashsalt": "kd", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
        yield all_axes
        for axes in all_axes:
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        try:
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        except (OSError, ValueError) as error:  # ValueError: an unknown format
            raise BadInput(f"--figure {file}: cannot be written ({getattr(error, 'strerror', None) or error})"
                           ) from error


def draw_figure(compared: dict[str, Any], file: Path) -> None:
    """A line a group, named by the folder of its first run: a dot a run on the test split, a tick at their mean.

    The ending of `file` decides the format. Raises BadInput where it cannot be written.
    """
    groups = compared["groups"]
    with drawing(file, (7, 0.9 + 0.55 * len(groups))) as (axes,):
        for place, group in enumerate(groups):
            for role, above in zip(ROLES, (0.0, 0.14, -0.14), strict=True):
                shares = [100 * row[role]["accuracy"] for row in compared["runs"]
                          if row["group"] == group["group"] and role in row]
                if shares:
                    axes.plot(shares, [place - above] * len(shares), "o", color=COLOURS[role], alpha=0.6, ms=5, mew=0,
                              label=None if place else role)
                    axes.plot([statistics.fmean(shares)], [place - above], "|", color=COLOURS[role], ms=13, mew=2)

        folders = [Path(group["runs"][0]) for group in groups]
        axes.set_yticks(range(len(groups)), [f"{folder.parent.name or folder.name} (n = {group['n']})"
                                             for folder, group in zip(folders, groups, strict=True)])
        axes.set(xlabel="test accuracy, %", ylim=(len(groups) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.legend(ncols=3, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))


def main(argv: list[str]) -> dict[str, Any]:
    """Prints, and returns, the result of `compare`. Raises BadInput."""
    parser = arguments.make_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its result.json")
    arguments.add_json_flag(parser, "one JSON object; accuracies as shares, not percent")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="draw it too: .svg, .png or .pdf")
    args = parser.parse_args(argv)

    results: dict[str, dict[str, Any]] = {}
    for name in args.runs:
        if name in results:
            raise BadInput(f"{name}: given twice; name every run once")
        results[name] = read_result(Path(name))
    compared = compare(results, {name: read_by_image(Path(name), result) for name, result in results.items()})

    if args.figure:
        draw_figure(compared, args.figure)
    print(json.dumps(compared) if args.json else format_text(compared))
    return compared
