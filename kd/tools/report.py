"""Runs beside each other, from their result.json: `python -m kd report RUN RUN ... [--json] [--figure FILE.svg]`.

Runs that differ only in the seed are a group, which has means ± sample standard deviations. Differences are taken
within each run: student and control start from the same weights and see the same views in the same order, so that
what a seed gives to both cancels.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from kd import BadInput
from kd.scores import SIGNIFICANCE, bootstrap_interval, compare_paired
from kd.tools import arguments, predictions
from kd.tools.predictions import ROLES, Predictions, read_predictions

# Settings that do not affect the result. A recipe is only a name for the others.
NOT_DECIDING = {"seed", "recipe", "control", "out", "resume", "overwrite", "cache_dir", "save_minutes", "quiet",
                "push_to_hub", "allow_weak_teacher"}


# ---- what a run left ------------------------------------------------------------------------------

def read_result(run: Path) -> dict[str, Any]:
    """What result.json holds. run: the folder of a run, or the file itself. Raises BadInput where it is none."""
    path = run / "result.json" if run.is_dir() else run
    try:
        result = json.loads(path.read_text("utf-8"))
        run_row("", 0, result, None)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a run that has ended") from error
    except (ValueError, KeyError, TypeError) as error:  # broken JSON, or another program's
        raise BadInput(f"{path}: not a run's result ({error!r}); give the folder of a run") from error
    return result


def read_by_image(run: Path) -> Predictions | None:
    """What predictions.npz beside that result holds; None where there is no such file. run: as for `read_result`."""
    file = (run if run.is_dir() else run.parent) / predictions.FILE
    return read_predictions(file) if file.exists() else None


def tested_on(content: Predictions) -> list[tuple[str, str]]:
    """The name of each test picture without its folders, and its class, so that copies of a data set are alike."""
    return [(Path(name).name, content.classes[label]) for name, label in zip(content.names, content.labels)]


# ---- runs and groups ------------------------------------------------------------------------------

def compare(results: dict[str, dict[str, Any]], by_image: dict[str, Predictions | None]) -> dict[str, Any]:
    """The runs, the groups that they make, and the settings in which the groups differ; ready for JSON.

    results: result.json by the name of the run; by_image: `read_by_image` by the name of the run.
    """
    members: dict[str, list[str]] = {}
    for name, result in results.items():
        members.setdefault(json.dumps(deciding(result["config"]), sort_keys=True), []).append(name)
    rows, groups = [], []
    for number, names in enumerate(members.values(), 1):
        group_rows = [run_row(name, number, results[name], by_image[name]) for name in names]
        group = group_row(number, group_rows, [by_image[name] for name in names])
        if len({json.dumps([results[name].get(key) for key in ("commit", "environment")]) for name in names}) > 1:
            group["notes"].append("made by different commits, machines or versions")
        rows += group_rows
        groups.append(group)
    return {"runs": rows, "groups": groups, "differ": differing([json.loads(settings) for settings in members])}


def run_row(name: str, group: int, result: dict[str, Any], content: Predictions | None) -> dict[str, Any]:
    """One run, its accuracies as shares with their counts.

    `gain` is student − control, and `headroom` teacher − control; both are None without a control. `p` is that of
    McNemar's exact test for the gain, or None without predictions.
    """
    row: dict[str, Any] = {
        "run": name, "group": group, "seed": result["config"]["seed"], "commit": result.get("commit"),
        **dict.fromkeys(("gain", "headroom", "p")),
        **{key: result[key] for key in ("seconds", "images_per_second")},
        **{role: {"params": result[role]["params"],
                  **{key: result[role][f"test_{key}"] for key in ("accuracy", "correct", "total")}}
           for role in ROLES if role in result}}
    if "control" in row:
        row["gain"], row["headroom"] = (row[role]["accuracy"] - row["control"]["accuracy"]
                                        for role in ("student", "teacher"))
        if content:
            row["p"] = compare_paired(content.logits["student"], content.logits["control"], content.labels)["p"]
    return row


def group_row(number: int, rows: list[dict[str, Any]], by_image: list[Predictions | None]) -> dict[str, Any]:
    """Means and deviations of the runs of a group.

    Their gain has an interval where all of them have predictions, of the same test images.
    """
    seeds = [row["seed"] for row in rows]
    notes: list[str] = []
    group: dict[str, Any] = {
        "group": number, "n": len(rows), "runs": [row["run"] for row in rows], "seeds": seeds, "notes": notes,
        **{role: mean_and_sd([row[role]["accuracy"] for row in rows if role in row]) for role in ROLES},
        **{difference: mean_and_sd([row[difference] for row in rows if "control" in row])
           for difference in ("gain", "headroom")}}
    contents = [content for content in by_image if content]
    if (len({row["student"]["total"] for row in rows}) > 1
            or any(tested_on(content) != tested_on(contents[0]) for content in contents)):
        notes.append("test pictures differ: no interval, and means over different pictures")
    elif len(contents) == group["gain"]["n"] == len(rows) > 1:
        student, control = (np.stack([content.correct(role) for content in contents]).astype(np.int64)
                            for role in ("student", "control"))
        group["gain"]["interval"] = gain_interval(student - control)
    if len(set(seeds)) < len(rows):
        notes.append("a seed occurs twice: the spread is that of fewer runs than n")
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
    """The settings that affect the result, except the seed. The runs of a group have them in common."""
    return {setting: value for setting, value in config.items() if setting not in NOT_DECIDING}


def differing(settings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all of `settings`, each with its values in their order."""
    names = dict.fromkeys(name for each in settings for name in each)
    columns = {name: [each.get(name) for each in settings] for name in names}
    return {name: column for name, column in columns.items() if column != column[:1] * len(column)}


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
        lines += ["", *aligned([head, *([setting, *map(str, values)] for setting, values in differ.items())])]
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
    return [str(group["group"]), str(group["n"]), ",".join(map(str, group["seeds"])),
            *(format_mean(group[role]) for role in ROLES),
            *(format_mean(group[difference], "+") for difference in ("gain", "headroom"))]


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


def draw_figure(compared: dict[str, Any], file: Path) -> None:
    """A line a group, named by the folder of its first run: a dot a run on the test split, a tick at their mean.

    The ending of `file` decides the format. Raises BadInput where it cannot be written.
    """
    from kd.tools import plots  # takes half a second to import
    runs, groups = compared["runs"], compared["groups"]
    with plots.drawing(file, (7, 0.9 + 0.55 * len(groups))) as (axes,):
        for role, below in zip(ROLES, (0.0, -0.14, 0.14), strict=True):
            places = [[100 * row[role]["accuracy"], row["group"] + below] for row in runs if role in row]
            means = [[100 * group[role]["mean"], group["group"] + below] for group in groups if group[role]["n"]]
            colour = plots.COLOURS[role]
            axes.plot(*np.reshape(places, (-1, 2)).T, "o", color=colour, alpha=0.6, ms=5, mew=0, label=role)
            axes.plot(*np.reshape(means, (-1, 2)).T, "|", color=colour, ms=13, mew=2)
        axes.set_yticks([group["group"] for group in groups],
                        [f"{Path(group['runs'][0]).parent.name} (n = {group['n']})" for group in groups])
        axes.set(xlabel="test accuracy, %", ylim=(len(groups) + 0.5, 0.5))
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def main(argv: list[str]) -> dict[str, Any]:
    """Prints, and returns, the result of `compare`. Raises BadInput."""
    parser = arguments.make_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's folder, or its result.json")
    arguments.add_json_flag(parser, "one JSON object; accuracies as shares, not percent")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="draw it too: .svg, .png or .pdf")
    args = parser.parse_args(argv)

    compared = compare({str(run): read_result(run) for run in args.runs},
                       {str(run): read_by_image(run) for run in args.runs})
    if args.figure:
        draw_figure(compared, args.figure)
    print(json.dumps(compared) if args.json else format_text(compared))
    return compared
