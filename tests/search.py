"""`python -m tests.search RUN ... > results/search.jsonl`: what a search for settings saw, which is validation alone.

A line a run: its settings, commit, and each role's accuracy and loss (NLL) on validation, by epoch. `table` is what the
README shows of them.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from kd import compare

LAST = 5  # epochs whose mean is told: of one epoch, 133 pictures say little


def line_of(run: Path) -> dict[str, Any]:
    """What a run's folder has to say to the search, ready for JSON."""
    result = compare.read_result(run)
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen: dict[str, Any] = {role: {key: [round(entry[key], 4) for entry in history if entry["role"] == role]
                                   for key in ("accuracy", "loss")}
                            for role in ("control", "student") if role in result}
    config = {**compare.deciding(result["config"]), "seed": result["config"]["seed"]}
    return {"config": config, "commit": result["commit"], **seen}


def table(lines: list[dict[str, Any]]) -> str:
    """A row for all lines that differ in their seed alone, best student first: a column a setting that differs between
    rows, n, and by role the mean over the seeds of the last epochs' accuracy, in %, and loss."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps(compare.deciding(line["config"])), []).append(line)
    differ = compare.differing([compare.deciding(group[0]["config"]) for group in groups.values()])

    def mean(group: list[dict[str, Any]], role: str, key: str) -> float:
        return statistics.fmean(statistics.fmean(line[role][key][-LAST:]) for line in group if role in line)

    rows = [[*(name.replace("_", " ") for name in differ), "n", "control", "student"]]
    rows.append(["---"] * len(rows[0]))
    for group in sorted(groups.values(), key=lambda group: -mean(group, "student", "accuracy")):
        told = [f"{100 * mean(group, role, 'accuracy'):.1f} % ({mean(group, role, 'loss'):.3f})"
                if any(role in line for line in group) else "" for role in ("control", "student")]
        rows.append([*(f"{group[0]['config'][name]:g}" if isinstance(group[0]["config"][name], float) else
                       str(group[0]["config"][name]) for name in differ), str(len(group)), *told])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        print(json.dumps(line_of(run)))
