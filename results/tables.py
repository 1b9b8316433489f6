"""The tables of README.md and results/README.md, made from the files of this folder.

    python -m results.tables                                        print them all
    python -m results.tables search RUN ... >> results/search.jsonl    add runs to the search
    python -m results.tables times RUN ... >> results/times.jsonl      add runs that were timed

A line of search.jsonl or times.jsonl is one run: its settings, its commit, and its figures on validation by epoch.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, Sequence

from kd.tools import report

HERE = Path(__file__).resolve().parent
TRAINING_PICTURES = 1034    # in the training split of beans
LAST_EPOCHS = 5             # their mean is shown: the 133 pictures of validation say little about one epoch
GOALS = (0.72, 0.85)        # accuracies on validation whose time is shown

# what the README shows: a folder of runs, and the recipe that made them
SUMMARY = {"beans-96-tutorial": "`tutorial` at 96 px, 30 epochs", "beans-96-crop-30": "`best --epochs 30`",
           "beans-96-best": "`best`, 200 epochs"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


# ---- finished runs on the test split -----------------------------------------------------------------------------

def compared(folder: Path) -> dict[str, Any]:
    """What `python -m kd report FOLDER/*` computes; all its runs must be one group."""
    runs = {str(run): report.read_result(run) for run in sorted(folder.iterdir())}
    return report.compare(runs, {run: report.read_by_image(Path(run), result) for run, result in runs.items()})


def gain_cell(group: dict[str, Any]) -> str:
    """Student minus control; empty without a control."""
    return difference_cell(group["gain"]) if group["gain"]["n"] else ""


def difference_cell(values: dict[str, Any]) -> str:
    """`+3.4 ± 5.6 points (-3.8 to +10.8)`: mean, deviation and 95 % interval of a difference."""
    low, high = (100 * limit for limit in values["interval"])
    return f"{report.format_mean(values, '+')} points ({low:+.1f} to {high:+.1f})"


def results_table() -> str:
    """A row for every folder of runs, with the count of correct test pictures of each run."""
    rows = []
    for folder in sorted(path for path in HERE.iterdir() if (path / "seed-0").is_dir()):
        found = compared(folder)
        group, = found["groups"]
        cells = []
        for role in report.ROLES:
            counts = [row[role]["correct"] for row in found["runs"] if role in row]
            total = next((row[role]["total"] for row in found["runs"] if role in row), 0)
            counts = counts[:1] if len(set(counts)) == 1 else counts    # one teacher for all runs
            cell = f"{report.format_mean(group[role])} % ({', '.join(map(str, counts))} of {total})"
            cells.append(cell if counts else "")
        rows.append([f"`{folder.name}`", str(group["n"]), *cells, gain_cell(group)])
    return markdown(["runs", "n", "teacher", "control", "student", "student − control"], rows)


def summary_table() -> str:
    """The three rows of the README."""
    rows = []
    for name, recipe in SUMMARY.items():
        group, = compared(HERE / name)["groups"]
        teacher = f"{100 * group['teacher']['mean']:.1f} %"
        rows.append([recipe, teacher, *(f"{report.format_mean(group[role])} %" for role in ("control", "student")),
                     gain_cell(group)])
    return markdown(["recipe", "teacher", "control", "student", "student − control"], rows)


# ---- the search, on the validation split -------------------------------------------------------------------------

def search_table(lines: list[dict[str, Any]]) -> str:
    """A row for all runs that differ only in their seed, best student first.

    It shows the settings that differ from most rows, the number of runs, and for each role the mean of the last
    epochs' accuracy, in %, and loss.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps(report.deciding(line["config"])), []).append(line)
    differing = report.differing([report.deciding(group[0]["config"]) for group in groups.values()])
    usual = {name: statistics.mode(values) for name, values in differing.items()}

    def mean(group: list[dict[str, Any]], role: str, key: str) -> float:
        return statistics.fmean(statistics.fmean(line[role][key][-LAST_EPOCHS:]) for line in group if role in line)

    rows = []
    for group in sorted(groups.values(), key=lambda group: -mean(group, "student", "accuracy")):
        config = group[0]["config"]
        changes = [f"{name} {config.get(name)}" for name in differing if config.get(name) != usual[name]]
        cells = [f"{100 * mean(group, role, 'accuracy'):.1f} % ({mean(group, role, 'loss'):.3f})"
                 if any(role in line for line in group) else "" for role in ("control", "student")]
        rows.append([", ".join(changes) or "nothing", str(len(group)), *cells])
    return markdown(["changed", "n", "control", "student"], rows)


# ---- timed runs --------------------------------------------------------------------------------------------------

def times_table(lines: list[dict[str, Any]], rates: dict[str, Any]) -> str:
    """A row for each run: when its student first reached each goal on validation, in seconds after its imports.

    rates: what `python -m kd bench compare --json` printed. The tutorial's seconds are computed from it: its epochs
    at the rate of the tutorial's loop.
    """
    rows = []
    for line in lines:
        config, student = line["config"], line["student"]
        if config["size"] == rates["size"] and config["batch_size"] == rates["batch_size"]:
            name, rate = "`tutorial`, in its own loop", rates["tutorial_img_s"]
            seconds = [(epoch + 1) * TRAINING_PICTURES / rate for epoch in range(config["epochs"])]
        else:
            name, rate = "`best`", statistics.median(student["images_per_second"])
            seconds = student["elapsed"]
        reached = [next((f"{spent:.0f} s" for accuracy, spent in zip(student["accuracy"], seconds, strict=True)
                         if accuracy >= goal), "never") for goal in GOALS]
        rows.append([name, *(str(config[key]) for key in ("size", "epochs", "seed")), f"{rate:.1f}", *reached,
                     f"{seconds[-1]:.0f} s"])
    head = ["recipe", "size", "epochs", "seed", "images/s", *(f"{100 * goal:.0f} % after" for goal in GOALS),
            "all epochs"]
    return markdown(head, rows)


# ---- all of them, by name ----------------------------------------------------------------------------------------

def tables() -> dict[str, str]:
    """Every table by the name that its comment in the documents has."""
    return {"summary": summary_table(), "results": results_table(),
            "times": times_table(read_lines(HERE / "times.jsonl"), json.loads((HERE / "compare.json").read_text())),
            "search": search_table(read_lines(HERE / "search.jsonl"))}


def shown(document: Path, name: str) -> str:
    """What a document has between its comments `name: ...` and `/name`."""
    block = re.search(rf"<!-- {name}: .*? -->\n(.*)\n<!-- /{name} -->", document.read_text(), re.DOTALL)
    assert block, f"{document}: no table {name}"
    return block[1]


def record(run: Path, figures: Sequence[str]) -> dict[str, Any]:
    """One line for search.jsonl or times.jsonl. figures: the keys of metrics.jsonl to keep."""
    result = report.read_result(run)
    history = read_lines(run / "metrics.jsonl")
    roles: dict[str, Any] = {
        role: {key: [round(entry[key], 4) for entry in history if entry["role"] == role] for key in figures}
        for role in ("control", "student") if role in result}
    config = {**report.deciding(result["config"]), "seed": result["config"]["seed"]}
    return {"config": config, "commit": result["commit"], **roles}


if __name__ == "__main__":
    kept = {"search": ("accuracy", "loss"), "times": ("accuracy", "elapsed", "images_per_second")}
    if sys.argv[1:2] and sys.argv[1] in kept:
        for folder in map(Path, sys.argv[2:]):
            print(json.dumps(record(folder, kept[sys.argv[1]])))
    else:
        for name, table in tables().items():
            print(f"{name}\n\n{table}\n")
