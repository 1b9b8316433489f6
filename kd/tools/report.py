"""Runs beside each other, from their result.json: `python -m kd report RUN RUN ... [--json] [--figure FILE.svg]`.

Runs that differ in nothing but the seed are one group: mean ± sample standard deviation. Student minus control is taken
within each run, where both start from the same weights and see the same views in the same order, so that what a seed
gives to both cancels.
"""

import argparse
import json
import statistics
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from kd import BadInput, cli

ROLES = ("teacher", "control", "student")
COLOURS = dict(teacher="#a8650a", control="#8b867d", student="#0d6f8a")  # apart for the colour-blind, on white
PREDICTIONS = "predictions.npz"
# settings that decide where a run writes and what it prints, but not what comes out; a recipe is a name for others
ELSEWHERE = {"seed", "recipe", "out", "resume", "overwrite", "cache_dir", "save_minutes", "push_to_hub", "push",
             "private", "quiet", "control"}


def read_result(run: Path) -> dict[str, Any]:
    """What result.json holds, of a run's folder or given as a file. Raises BadInput where it is none."""
    path = run / "result.json" if run.is_dir() else run
    try:
        result = json.loads(path.read_text())
        if not isinstance(result, dict):
            raise KeyError("an object")
        for role in [one for one in ROLES if one in result] or ROLES:
            int(result[role]["test_correct"]), int(result[role]["test_total"]), int(result[role]["params"])
            float(result[role]["test_accuracy"])
        for role in ("teacher", "student"):
            result[role]
        result["config"]["seed"], float(result["seconds"]), float(result["images_per_second"])
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a run that has ended") from error
    except ValueError as error:  # broken JSON, bytes that are no text, a number that is none
        raise BadInput(f"{path}: not readable as a result ({error}); give the folder of a run") from error
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a run's result (lacks {error}); give the folder of a run") from error
    return result


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """What kd/tools/page.py keeps of a run: test logits by role, labels, classes, pictures.

    Raises BadInput where it is absent or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
        count, classes = kept["teacher"].shape
        if (kept["student"].shape != (count, classes) or kept["classes"].shape != (classes,)
                or any(kept[name].shape != (count,) for name in ("labels", "names"))
                or len(kept["pictures"]) != len(kept["shown"]) or len(kept["views"]) != len(kept["view_labels"])):
            raise ValueError("its arrays do not fit each other")
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; a run writes it when it ends, and --resume ends it") from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise BadInput(f"{path}: not readable ({error}); remove it and report.html, then --resume the run") from error
    return kept


def gains(run: Path, result: dict[str, Any]) -> np.ndarray | None:
    """`(N,)` by test image: 1 where the student alone is right, -1 where its control alone is, else 0.

    None where a run has no control, or was made before runs kept their predictions.
    """
    if "control" not in result or not (run / PREDICTIONS).exists():
        return None
    kept = read_predictions(run / PREDICTIONS)
    right = {role: (kept[role].argmax(1) == kept["labels"]).astype(np.int64) for role in ("student", "control")}
    return right["student"] - right["control"]


def bootstrap(gained: np.ndarray, draws: int = 10_000) -> list[float]:
    """The 95 % interval of the mean of `gained` `(runs, images)`, runs and images both drawn again with replacement.

    Images are drawn for all runs at once, as the test split is the same for all: what makes an image hard is no noise
    of one run. The interval is that of the percentiles.
    """
    generator = np.random.default_rng(0)
    runs, images = (generator.multinomial(count, np.full(count, 1 / count), size=draws) / count
                    for count in gained.shape)
    means = ((runs @ gained) * images).sum(axis=1)
    return [float(limit) for limit in np.quantile(means, [0.025, 0.975])]


def mean_and_sd(values: list[float]) -> dict[str, Any]:
    """n, mean and the sample standard deviation (n - 1; None for fewer than two values)."""
    return {"n": len(values), "mean": statistics.fmean(values) if values else None,
            "sd": statistics.stdev(values) if len(values) > 1 else None}


def row_of(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """One run: accuracies as shares with their counts, and the gain of the student over its control, if it has one."""
    row: dict[str, Any] = {"run": name, "seed": result["config"]["seed"]}
    for role in ROLES:
        if role in result:
            row[role] = {key: result[role][f"test_{key}"] for key in ("accuracy", "correct", "total")}
            row[role]["params"] = result[role]["params"]
    row["gain"] = row["student"]["accuracy"] - row["control"]["accuracy"] if "control" in row else None
    return {**row, "seconds": result["seconds"], "images_per_second": result["images_per_second"],
            "commit": result.get("commit")}


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what comes out, the seed aside: what the runs of a group have in common."""
    return {setting: value for setting, value in config.items() if setting not in ELSEWHERE}


def differing(settings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all of `settings`, each with its values in their order."""
    known = dict.fromkeys(setting for one in settings for setting in one)
    return {setting: [one.get(setting) for one in settings] for setting in known
            if any(one.get(setting) != settings[0].get(setting) for one in settings)}


def compare(results: dict[str, dict[str, Any]], gained: dict[str, np.ndarray | None]) -> dict[str, Any]:
    """The runs (by name), the groups that they make, and the settings in which the groups differ; ready for JSON.

    gained: what `gains` says of each run; groups in which all runs have it get the interval of their gain.
    """
    members: dict[str, list[str]] = {}
    settings = {}
    for name, result in results.items():
        settings[name] = key = deciding(result["config"])
        members.setdefault(json.dumps(key, sort_keys=True), []).append(name)
    rows = [row_of(name, result) for name, result in results.items()]
    groups = []
    for number, names in enumerate(members.values(), 1):
        inside = [row for row in rows if row["run"] in names]
        for row in inside:
            row["group"] = number
        group: dict[str, Any] = {
            "group": number, "n": len(names), "runs": names, "seeds": [row["seed"] for row in inside],
            **{role: mean_and_sd([row[role]["accuracy"] for row in inside if role in row]) for role in ROLES},
            "gain": mean_and_sd([row["gain"] for row in inside if row["gain"] is not None]), "notes": []}
        images = [one for one in (gained[name] for name in names) if one is not None]
        if len(images) == len(names) > 1 and len({len(one) for one in images}) == 1:
            group["gain"]["interval"] = bootstrap(np.stack(images))
        if len(set(group["seeds"])) < len(names):
            group["notes"].append("a seed occurs twice: the spread is that of fewer runs than n")
        for what, values in (("commits", [row["commit"] for row in inside]),
                             ("machines or versions", [results[name].get("environment") for name in names])):
            if any(value != values[0] for value in values):
                group["notes"].append(f"made by different {what}")
        groups.append(group)
    return {"runs": rows, "groups": groups,
            "differ": differing([settings[names[0]] for names in members.values()])}


def aligned(lines: list[list[str]], left: int = 1) -> list[str]:
    """Columns: the first `left` to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]


def around(values: dict[str, Any], sign: str = "") -> str:
    """`62.3 ± 1.4` from shares, as percent; the mean alone for one value, a dash for none."""
    if values["mean"] is None:
        return "-"
    mean = f"{round(100 * values['mean'], 1) + 0.0:{sign}.1f}"  # adding zero makes -0.0 positive
    return mean if values["sd"] is None else f"{mean} ± {100 * values['sd']:.1f}"


def format_text(compared: dict[str, Any]) -> str:
    """What `compare` found, for people."""
    lines = [["run", "group", "seed", *(f"{role} %" for role in ROLES), "student - control", "parameters", "seconds",
              "images/s"]]
    for row in compared["runs"]:
        cells = [f"{100 * row[role]['accuracy']:.1f} ({row[role]['correct']}/{row[role]['total']})" if role in row
                 else "-" for role in ROLES]
        gain = "-"
        if row["gain"] is not None:
            gain = f"{100 * row['gain']:+.1f} ({row['student']['correct'] - row['control']['correct']:+d})"
        lines.append([row["run"], str(row["group"]), str(row["seed"]), *cells, gain, f"{row['student']['params']:,}",
                      f"{row['seconds']:.0f}", f"{row['images_per_second']:.1f}"])
    said = [*aligned(lines), "", "mean ± sample standard deviation over the runs of a group, in %; the difference is "
            "taken within each run, in points"]
    lines = [["group", "n", "seeds", *ROLES, "student - control"]]
    for group in compared["groups"]:
        gain = around(group["gain"], "+") + (f" (n = {group['gain']['n']})" if 0 < group["gain"]["n"] < group["n"]
                                             else "")
        lines.append([str(group["group"]), str(group["n"]), ",".join(map(str, group["seeds"])),
                      *(around(group[role]) for role in ROLES), gain])
    said += aligned(lines)
    for group in compared["groups"]:
        if "interval" in group["gain"]:
            low, high = (100 * limit for limit in group["gain"]["interval"])
            said.append(f"group {group['group']}: student - control = {around(group['gain'], '+')} points, 95 % "
                        f"interval {low:+.1f} to {high:+.1f} (bootstrap over runs and test images)")
    said += [f"note: group {group['group']}: {note}" for group in compared["groups"] for note in group["notes"]]
    if compared["differ"]:
        said += ["", *aligned([["settings that differ", *(f"group {group['group']}" for group in compared["groups"])],
                               *([setting, *("-" if value is None else str(value) for value in values)]
                                 for setting, values in compared["differ"].items())])]
    elif len(compared["runs"]) > 1:
        said += ["", "the runs differ in nothing but the seed"]
    return "\n".join(said)


def figure(compared: dict[str, Any], file: Path) -> None:
    """A line a group, named by the folder of its first run: a dot a run on the test split, a tick at their mean.

    The ending of `file` says which format: svg, png or pdf. Raises BadInput where it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # half a second to import, for this alone
    groups = compared["groups"]
    with rc_context({"svg.hashsalt": "kd", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}):
        drawing = Figure(figsize=(7, 0.9 + 0.55 * len(groups)), layout="constrained")
        axes = drawing.subplots()
        for place, group in enumerate(groups):
            for role, above in zip(ROLES, (0.0, 0.14, -0.14), strict=True):
                shares = [100 * row[role]["accuracy"] for row in compared["runs"]
                          if row["group"] == group["group"] and role in row]
                if shares:
                    axes.plot(shares, [place - above] * len(shares), "o", color=COLOURS[role], alpha=0.6, ms=5, mew=0,
                              label=None if place else role)
                    axes.plot([statistics.fmean(shares)], [place - above], "|", color=COLOURS[role], ms=13, mew=2)
        names = [Path(group["runs"][0]) for group in groups]
        axes.set_yticks(range(len(groups)), [f"{name.parent.name or name.name} (n = {group['n']})"
                                             for name, group in zip(names, groups, strict=True)])
        axes.set(xlabel="test accuracy, %", ylim=(len(groups) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.legend(ncols=3, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
        try:
            drawing.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        except (OSError, ValueError) as error:  # ValueError: an unknown format
            raise BadInput(f"--figure {file}: cannot be written ({getattr(error, 'strerror', None) or error})"
                           ) from error


def main(argv: list[str]) -> dict[str, Any]:
    """Prints, and returns, what `compare` found. Raises BadInput."""
    parser = cli.OneLineParser(prog="python -m kd report", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its result.json")
    parser.add_argument("--json", action="store_true", help="one JSON object; accuracies as shares, not percent")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="draw it too: .svg, .png or .pdf")
    args = parser.parse_args(argv)
    results: dict[str, dict[str, Any]] = {}
    gained = {}
    for name in args.runs:
        if name in results:
            raise BadInput(f"{name}: given twice; name every run once")
        results[name] = read_result(Path(name))
        gained[name] = gains(Path(name), results[name])
    compared = compare(results, gained)
    if args.figure:
        figure(compared, args.figure)
    print(json.dumps(compared) if args.json else format_text(compared))
    return compared
