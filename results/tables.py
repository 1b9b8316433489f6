"""What runs saw of validation: which settings were searched by, and how soon runs that were timed got where.

    python -m results.search RUN ... > results/search.jsonl
    python -m results.search --times RUN ... > results/times.jsonl

A line a run: its settings, commit, and each role's figures on validation, by epoch. `table` and `times` are what the
README shows of them.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from kd.tools import report

PICTURES = 1034  # in the training split of beans
LAST = 5  # epochs whose mean is told: of one epoch, 133 pictures say little


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def line_of(run: Path, figures: tuple[str, ...]) -> dict[str, Any]:
    """What a run's folder has to say of validation, ready for JSON."""
    result = report.read_result(run)
    history = read_lines(run / "metrics.jsonl")
    seen: dict[str, Any] = {role: {key: [round(entry[key], 4) for entry in history if entry["role"] == role]
                                   for key in figures}
                            for role in ("control", "student") if role in result}
    config = {**report.deciding(result["config"]), "seed": result["config"]["seed"]}
    return {"config": config, "commit": result["commit"], **seen}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table of the README."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def table(lines: list[dict[str, Any]]) -> str:
    """A row for all lines that differ in their seed alone, best student first: the settings in which they are not as
    most rows are, n, and by role the mean over the seeds of the last epochs' accuracy, in %, and loss."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps(report.deciding(line["config"])), []).append(line)
    differ = report.differing([report.deciding(group[0]["config"]) for group in groups.values()])
    usual = {name: statistics.mode(values) for name, values in differ.items()}

    def mean(group: list[dict[str, Any]], role: str, key: str) -> float:
        return statistics.fmean(statistics.fmean(line[role][key][-LAST:]) for line in group if role in line)

    rows = []
    for group in sorted(groups.values(), key=lambda group: -mean(group, "student", "accuracy")):
        told = [f"{100 * mean(group, role, 'accuracy'):.1f} % ({mean(group, role, 'loss'):.3f})"
                if any(role in line for line in group) else "" for role in ("control", "student")]
        unusual = [f"{name} {group[0]['config'][name]}" for name in differ if group[0]["config"][name] != usual[name]]
        rows.append([", ".join(unusual) or "nothing", str(len(group)), *told])
    return markdown(["changed", "n", "control", "student"], rows)


def times(lines: list[dict[str, Any]], rates: dict[str, Any]) -> str:
    """A row a run: when its student first had 72 and 85 % right on validation, in seconds since its process had its
    imports. The tutorial's are counted for its own loop instead, at the rate of its steps by `kd.bench compare`."""
    rows = []
    for line in lines:
        config, student = line["config"], line["student"]
        if config["size"] == rates["size"] and config["batch_size"] == rates["batch_size"]:
            name, rate = "`tutorial`, in its own loop", rates["tutorial_img_s"]
            seconds = [(epoch + 1) * PICTURES / rate for epoch in range(config["epochs"])]
        else:
            name, rate = "`best`", statistics.median(student["images_per_second"])
            seconds = student["elapsed"]
        first = [next((f"{spent:.0f} s" for right, spent in zip(student["accuracy"], seconds, strict=True)
                       if right >= goal), "never") for goal in (0.72, 0.85)]
        rows.append([name, *(str(config[key]) for key in ("size", "epochs", "seed")), f"{rate:.1f}", *first,
                     f"{seconds[-1]:.0f} s"])
    return markdown(["recipe", "size", "epochs", "seed", "images/s", "72 % after", "85 % after", "all epochs"], rows)


if __name__ == "__main__":
    timed = sys.argv[1:2] == ["--times"]
    for run in map(Path, sys.argv[1 + timed:]):
        print(json.dumps(line_of(run, ("accuracy", "elapsed", "images_per_second") if timed else ("accuracy", "loss"))))
