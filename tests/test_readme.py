"""What the documents say: their numbers, the flags, the worked changes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from kd import cli
from kd.machine import checkpoint
from kd.tools import report
from results.keep import read_lines

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
INSIDE = (ROOT / "kd" / "README.md").read_text()


# ---- numbers -----------------------------------------------------------------------------------

def test_every_result_was_made_by_a_committed_state_and_lies_under_its_seed():
    runs = [path.parent for path in (ROOT / "results").rglob("result.json")]
    assert len(runs) >= 30
    for run in runs:
        result = report.read_result(run)
        assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), run
        assert run.name == f"seed-{result['config']['seed']}"


def test_the_search_has_every_epoch_and_saw_nothing_of_test():
    for line in read_lines(ROOT / "results" / "search.jsonl"):
        assert line.keys() <= {"config", "commit", "control", "student"}
        assert re.fullmatch(r"[0-9a-f]{40}", line["commit"])
        for role in {"control", "student"} & line.keys():
            assert {key: len(values) for key, values in line[role].items()} == dict.fromkeys(
                ("accuracy", "loss"), line["config"]["epochs"])


# ---- the flags and the files ---------------------------------------------------------------------

@pytest.mark.parametrize("text, folder", [(README, ROOT), (INSIDE, ROOT / "kd")])
def test_every_file_that_is_linked_or_named_is_there(text, folder):
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")}
    names = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text))
    assert len(links) + len(names) > 5
    for path in links | names:
        assert (folder / path).exists() or (ROOT / path).exists(), path


def test_the_ten_flags_are_there_with_their_defaults():
    table, = re.findall(r"<!-- flags: .*? -->\n(.*)\n<!-- /flags -->", README, re.DOTALL)
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    assert len(rows) == 10
    for option, default in rows:
        name = option.removeprefix("--").replace("-", "_")
        assert default == cli.default_text(name, getattr(train.Config(), name), train.RECIPES), option


# ---- worked changes ------------------------------------------------------------------------------

def test_the_worked_changes_apply_and_train(photos, tmp_path):
    """To correct a diff that no longer applies: make the change by hand in a copy, and show `git diff -U1` of it.

    The lines `diff --git` and `index` can go, and so can what stands behind the second `@@` of a hunk.
    """
    diffs = re.findall(r"^```diff\n(.*?)^```", README + INSIDE, re.DOTALL | re.MULTILINE)
    assert len(diffs) == 5
    clone = tmp_path / "kd"
    shutil.copytree(ROOT / "kd", clone / "kd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", clone)
    for diff in diffs:
        assert len(re.findall(r"^[+-](?![+-])", diff, re.MULTILINE)) <= 12
        subprocess.run(["git", "apply", "-"], cwd=clone, input=diff, text=True, check=True)

    flags = ("--recipe tutorial --size 32 --epochs 1 --lr 1e-3 --teacher test_resnet --teacher-weights none "
             "--teacher-epochs 0 --allow-weak-teacher --student mobilenetv2_025 --augment grey --method mse --out run "
             "--cache-dir cache").split()
    done = subprocess.run([sys.executable, "train.py", "--dataset", str(photos), *flags], cwd=clone,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    result = json.loads(done.stdout.splitlines()[-1])
    assert result["student"]["model"] == "mobilenetv2_025" and result["student"]["params"] < 300_000
    assert result["config"]["augment"] == "grey"

    state = checkpoint.load(clone / "run" / "last.ckpt")
    assert state is not None
    head, backbone = state["optimizer"]["param_groups"]
    assert head["initial_lr"] == 1e-3 and backbone["initial_lr"] == 1e-4
    assert 0 < backbone["lr"] < head["lr"] and head["lr"] == pytest.approx(10 * backbone["lr"])
    assert len(head["params"]) == 2 and len(backbone["params"]) > 100
