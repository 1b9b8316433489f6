"""What the README says: its numbers, its table of flags, its worked diffs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import train
from kd import cli
from kd.tools import report
from results import search

ROOT = Path(__file__).resolve().parents[1]


def shown(block: str) -> str:
    """What the README has between the comments `block: ...` and `/block`."""
    found = re.search(rf"<!-- {block}: .*? -->\n(.*)<!-- /{block} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, block
    return found[1]


def results_table() -> str:
    """A row for every folder of results/, as `python -m kd report results/NAME/*` sees its runs."""
    lines = ["| runs | n | teacher | control | student | student - control |", "|---|---|---|---|---|---|"]
    for folder in sorted(path for path in (ROOT / "results").iterdir() if path.is_dir()):
        runs = {str(run): report.read_result(run) for run in sorted(folder.iterdir())}
        assert [f"seed-{result['config']['seed']}" for result in runs.values()] == [Path(run).name for run in runs]
        for run, result in runs.items():
            assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), f"{run} was not made by a committed state"
        compared = report.compare(runs, {run: report.gains(Path(run), result) for run, result in runs.items()})
        group, = compared["groups"]
        cells = []
        for role in report.ROLES:
            counts = [row[role]["correct"] for row in compared["runs"] if role in row]
            total = next((row[role]["total"] for row in compared["runs"] if role in row), 0)
            once = counts[:1] if len(set(counts)) == 1 else counts  # one teacher for all runs
            cells.append(f"{report.around(group[role])} % ({', '.join(map(str, once))} of {total})" if counts else "")
        gain = f"{report.around(group['gain'], '+')} points" if group["gain"]["n"] else ""
        if "interval" in group["gain"]:
            gain += " ({:+.1f} to {:+.1f})".format(*(100 * limit for limit in group["gain"]["interval"]))
        lines.append(f"| `results/{folder.name}` | {group['n']} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def test_the_results_are_those_of_the_runs():
    """To mend it, put what `results_table` gives between the two comments."""
    assert shown("results") == results_table() + "\n"


def test_the_search_is_told_as_it_was_and_saw_nothing_of_test():
    """To mend it, put what `search.table` gives between the two comments."""
    lines = search.read_lines(ROOT / "results" / "search.jsonl")
    for line in lines:
        assert line.keys() <= {"config", "commit", "control", "student"}
        assert re.fullmatch(r"[0-9a-f]{40}", line["commit"])
        for role in {"control", "student"} & line.keys():
            assert {key: len(values) for key, values in line[role].items()} == dict.fromkeys(
                ("accuracy", "loss"), line["config"]["epochs"])
    assert shown("search") == search.table(lines) + "\n"


def test_the_times_are_those_that_were_taken():
    """To mend it, put what `search.times` gives between the two comments."""
    lines = search.read_lines(ROOT / "results" / "times.jsonl")
    rates = json.loads((ROOT / "results" / "compare.json").read_text())
    assert shown("times") == search.times(lines, rates) + "\n"


def test_the_table_of_flags_is_the_config():
    """To mend it, put what this prints between the two comments."""
    made = cli.flags_table(train.Config, train.RECIPES).replace(cli.CACHE_DIR, "~/.cache/kd")
    assert shown("flags") == made + "\n"


def test_the_worked_diffs_apply_are_short_and_train(photos, tmp_path):
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(diffs) == 3
    copy = tmp_path / "kd"
    shutil.copytree(ROOT / "kd", copy / "kd")
    shutil.copy(ROOT / "train.py", copy)
    for diff in diffs:
        assert len(re.findall(r"^[+-](?![+-])", diff, re.MULTILINE)) < 10
        subprocess.run(["git", "apply", "--unidiff-zero", "-"], cwd=copy, input=diff, text=True, check=True)
    flags = ("--recipe tutorial --size 32 --epochs 1 --lr 1e-3 --teacher test_resnet --teacher-weights none "
             "--teacher-epochs 0 --allow-weak-teacher --student mobilenetv2_025 --augment grey --out run "
             "--cache-dir cache").split()
    done = subprocess.run([sys.executable, "train.py", "--dataset", str(photos), *flags], cwd=copy, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["student"]["model"] == "mobilenetv2_025" and result["student"]["params"] < 300_000
