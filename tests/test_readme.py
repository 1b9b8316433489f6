"""What the README says: its numbers, its table of flags, its worked diffs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import train
from kd import cli

ROOT = Path(__file__).parent.parent


def test_every_row_equals_its_result_and_every_result_has_a_row():
    found = set()
    for line in (ROOT / "README.md").read_text().splitlines():
        if not (named := re.search(r"`(results/\S+\.json)`", line)):
            continue
        found.add(named[1])
        result = json.loads((ROOT / named[1]).read_text())
        shown = re.findall(r"([\d.]+) % \((\d+)/(\d+)\)", line)
        roles = [role for role in ("teacher", "control", "student") if role in result]
        assert len(shown) == len(roles), line
        for role, (percent, correct, total) in zip(roles, shown, strict=True):
            row = result[role]
            assert (int(correct), int(total)) == (row["test_correct"], row["test_total"]), line
            assert percent == f"{100 * row['test_accuracy']:.1f}", line
        assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), f"{named[1]} was not made by a committed state"
        assert result["config"]["seed"] == int(re.search(r"seed (\d+)", line)[1]), line  # type: ignore[index]
    assert found == {str(path.relative_to(ROOT)) for path in (ROOT / "results").glob("*.json")}


def test_the_table_of_flags_is_the_config():
    """To mend it, put what this prints between the two comments."""
    made = cli.flags_table(train.Config, train.RECIPES).replace(cli.CACHE_DIR, "~/.cache/kd")
    shown = re.search(r"<!-- flags: .*? -->\n(.*)<!-- /flags -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown and shown[1] == made + "\n"


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
