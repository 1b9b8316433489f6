"""What old terminals, older Pythons and other versions of the libraries may lack."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm.models.efficientnet import EfficientNet
from torch import nn

from kd.fast import blocks

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command, said", [
    (["train.py", "--help"], "\\u03bb, the teacher's share of the loss"),
    (["-m", "kd", "report", "--help"], "means ± sample standard deviations")])
def test_help_goes_through_a_pipe_of_few_letters(command, said):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1:strict"})
    assert (done.returncode, done.stderr) == (0, b"") and said in " ".join(done.stdout.decode("latin-1").split())


@pytest.mark.parametrize("path", [*(ROOT / "kd").rglob("*.py"), ROOT / "train.py"], ids=lambda path: path.name)
def test_the_syntax_is_that_of_python_3_10(path):
    tree = ast.parse(path.read_text("utf-8"), feature_version=(3, 10))
    for node in ast.walk(tree):     # that parser lets x[*y] pass
        assert not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
                    and any(isinstance(part, ast.Starred) for part in node.slice.elts)), node.lineno


# ---- what other versions of the libraries may lack ------------------------------------------------

def test_where_timm_has_moved_its_blocks_the_model_stays_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models._efficientnet_blocks", None)
    spec = importlib.util.spec_from_file_location("another", str(blocks.__file__))
    assert spec and spec.loader
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.unavailable().startswith("the fused blocks do not know this version of timm (")
    model = timm.create_model("mobilenetv2_050")
    assert type(another.accelerate(model)) is EfficientNet and not another.slow_in_bf16(nn.Linear(2, 2))
