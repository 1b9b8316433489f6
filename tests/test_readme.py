"""What the documents say: their numbers, the loop, the flags, the worked changes."""

import copy
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from kd import cli
from kd.bench.compare import tutorial_loop
from kd.machine import checkpoint
from kd.tools import report
from results import arms, tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    """What the README has between ```language and ```."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


# ---- numbers -----------------------------------------------------------------------------------

@functools.cache
def every_table() -> dict[str, str]:
    return tables.tables() | arms.tables()


@pytest.mark.parametrize("document, name", [("README.md", "summary"), ("results/README.md", "results"),
                                            ("results/README.md", "folds"), ("results/README.md", "times"),
                                            ("results/README.md", "search"),
                                            ("README.md", "few"), ("results/README.md", "few"),
                                            ("results/README.md", "by class"), ("results/README.md", "parts"),
                                            ("results/README.md", "patience"), ("results/README.md", "wrong"),
                                            ("results/README.md", "pretrained"),
                                            ("results/README.md", "methods"), ("results/README.md", "methods on beans"),
                                            ("results/README.md", "tuning"), ("results/README.md", "steps")])
def test_every_table_is_made_from_its_runs(document, name):
    """To correct it, put what `python -m results.tables` or `results.arms` prints between the two comments."""
    assert tables.shown(ROOT / document, name) == every_table()[name]


def dots(figure: Path) -> list[tuple[str, int, int]]:
    """The colour and the place of each dot of an SVG file, in whole points."""
    found = re.findall(r'<use [^>]*x="([^"]*)" y="([^"]*)" style="fill: ([^;"]*)', figure.read_text())
    return [(colour, round(float(x)), round(float(y))) for x, y, colour in found]


@pytest.mark.parametrize("name, least", [("few", 60), ("methods", 10)])
def test_every_figure_is_drawn_from_its_runs(tmp_path, name, least):
    """To correct it, run `python -m results.arms`. Another matplotlib may write other bytes, but the same dots."""
    arms.FIGURES[name](tmp_path / "drawn.svg")
    assert dots(ROOT / "results" / f"{name}.svg") == dots(tmp_path / "drawn.svg")
    assert len(dots(tmp_path / "drawn.svg")) >= least


def test_every_result_was_made_by_a_committed_state_and_lies_under_its_seed():
    runs = [path.parent for path in (ROOT / "results").rglob("result.json")]
    assert len(runs) >= 30
    for run in runs:
        result = report.read_result(run)
        assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), run
        assert run.name == f"seed-{result['config']['seed']}"


def test_the_search_has_every_epoch_and_saw_nothing_of_test():
    for line in tables.read_lines(ROOT / "results" / "search.jsonl"):
        assert line.keys() <= {"config", "commit", "control", "student"}
        assert re.fullmatch(r"[0-9a-f]{40}", line["commit"])
        for role in {"control", "student"} & line.keys():
            assert {key: len(values) for key, values in line[role].items()} == dict.fromkeys(
                ("accuracy", "loss"), line["config"]["epochs"])


# ---- the loop and the flags ----------------------------------------------------------------------

def test_the_loop_in_the_readme_is_the_one_that_the_benchmark_times():
    """Both train the same student on the same batches, to the same bits."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
                        for _ in range(2))
    teacher.eval()
    twin = copy.deepcopy(student)
    images = [torch.randn(4, 3, 2, 2) for _ in range(3)]
    labels = [torch.randint(3, (4,)) for _ in range(3)]
    before = copy.deepcopy(student.state_dict())

    shown: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    exec(code_blocks("python")[0], shown)
    shown["distil"](student, teacher, torch.optim.AdamW(student.parameters(), lr=1e-2),
                    list(zip(images, labels, strict=True)), 5.0, 0.5)
    tutorial_loop(twin, teacher, torch.optim.AdamW(twin.parameters(), lr=1e-2), images, labels, 5.0, 0.5)

    for name, value in twin.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
        assert not torch.equal(before[name], value), name


def test_the_ten_flags_are_there_with_their_defaults():
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]]
            for line in tables.shown(ROOT / "README.md", "flags").splitlines()[2:]]
    assert len(rows) == 10
    for option, default in rows:
        name = option.removeprefix("--").replace("-", "_")
        assert default == cli.default_text(name, getattr(train.Config(), name), train.RECIPES), option


# ---- worked changes ------------------------------------------------------------------------------

def test_the_four_worked_changes_apply_and_train(photos, tmp_path):
    """To correct a diff that no longer applies: make the change by hand in a copy, and show `git diff -U1` of it.

    The lines `diff --git` and `index` can go, and so can what stands behind the second `@@` of a hunk.
    """
    diffs = code_blocks("diff")
    assert len(diffs) == 4
    clone = tmp_path / "kd"
    shutil.copytree(ROOT / "kd", clone / "kd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", clone)
    for diff in diffs:
        assert len(re.findall(r"^[+-](?![+-])", diff, re.MULTILINE)) < 10
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
