"""What Windows, macOS and old terminals lack, and what other versions of the libraries may lack."""

import ast
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.efficientnet import EfficientNet
from torch import nn

from kd import BadInput, pretrained
from kd.bench import limits
from kd.data import frames, samples, tables
from kd.fast import blocks, build, fused_loss
from kd.losses import kd_loss
from kd.machine import records
from kd.machine.files import write_at
from tests.helpers.runs import command_line

ROOT = Path(__file__).resolve().parents[1]
CP1252 = {**os.environ, "PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0", "LC_ALL": "C",
          "PYTHONCOERCECLOCALE": "0"}


def test_a_run_does_without_what_only_unix_has(trained, tmp_path):
    """Two runs in one process, of which the second replaces the first."""
    config, expected = trained
    config = dataclasses.replace(config, out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))
    flags = command_line(config)
    done = subprocess.run([sys.executable, "-X", "warn_default_encoding", "tests/helpers/other_system.py", *flags, "--",
                           *flags, "--overwrite"], cwd=ROOT, env=CP1252, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    lines = done.stdout.decode("cp1252").splitlines()
    first, second = (json.loads(line) for line in lines if line.startswith("{"))
    assert json.loads((tmp_path / "run" / "result.json").read_text("utf-8")) == second
    for role in ("teacher", "student"):
        assert first[role] == second[role] == expected[role]
    assert (first["teacher_batches"], second["teacher_batches"]) == (expected["teacher_batches"], 0)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("command, said", [
    (["train.py", "--help"], "loss = (1 - \\u03bb)·CE(student, labels) + \\u03bb·T²·KL"),
    (["-m", "kd", "report", "--help"], "means ± sample standard deviations")])
def test_help_goes_through_a_pipe_of_western_windows(command, said):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=CP1252, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and said in " ".join(done.stdout.decode("cp1252").split())


@pytest.mark.parametrize("path", [*(ROOT / "kd").rglob("*.py"), ROOT / "train.py"], ids=lambda path: path.name)
def test_the_syntax_is_that_of_python_3_10(path):
    tree = ast.parse(path.read_text("utf-8"), feature_version=(3, 10))
    # what that parser lets pass: x[*y], and an argument of Python 3.11
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
                    and any(isinstance(part, ast.Starred) for part in node.slice.elts)), node.lineno
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("catch_warnings")
                    and any(keyword.arg == "action" for keyword in node.keywords)), node.lineno


# ---- what other versions of the libraries may lack ------------------------------------------------

def copy_without(monkeypatch, module: ModuleType, *absent: str) -> ModuleType:
    """The module, imported once more where the modules `absent` cannot be."""
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location(module.__name__ + "_copy", str(module.__file__))
    assert spec and spec.loader
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_where_timm_has_moved_its_blocks_the_model_stays_as_it_is(monkeypatch):
    copy = copy_without(monkeypatch, blocks, "timm.models._efficientnet_blocks")
    assert copy.unavailable().startswith("the fused blocks do not know this version of timm (")
    model = timm.create_model("mobilenetv2_050")
    assert type(copy.accelerate(model)) is type(model) is EfficientNet and not copy.slow_in_bf16(nn.Linear(2, 2))


@pytest.mark.parametrize("change", [lambda block: block.add_module("another", nn.Identity()),
                                    lambda block: delattr(block, "drop_path"),
                                    lambda block: delattr(block, "has_skip")])
def test_a_block_in_which_timm_computes_something_else_stays_as_it_is(monkeypatch, change):
    monkeypatch.setattr(blocks, "unavailable", lambda: "")
    model: Any = timm.create_model("mobilenetv2_050")
    change(model.blocks[1][0])
    blocks.accelerate(model)
    assert type(model.blocks[1][0]) is blocks.InvertedResidual
    assert type(model.blocks[1][1]) is blocks.FusedInvertedResidual and type(model) is blocks.FusedEfficientNet


@pytest.mark.parametrize("known", [True, False])
def test_the_fused_gradient_needs_no_private_function_of_torch(monkeypatch, known):
    if not known:
        monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected, = torch.autograd.grad(kd_loss(student, teacher, labels, 2.0, 0.5), student)
    loss = fused_loss.fused_kd_loss(student, teacher, labels, 2.0, 0.5)
    for keep in (True, False):
        gradient, = torch.autograd.grad(3 * loss, student, retain_graph=keep)
        torch.testing.assert_close(gradient, 3 * expected)


def test_without_tensorboard_a_line_says_so_and_the_log_is_written(monkeypatch, tmp_path, capsys):
    copy = copy_without(monkeypatch, records, "tensorboard.compat.proto.event_pb2")
    log = copy.Records(tmp_path)
    entries = [{"role": "student", "epoch": 1, "accuracy": 0.5, "time": 0.0}]
    log.write(entries)
    log.write(entries * 2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 and not log.board.exists()
    assert capsys.readouterr().out.startswith("no TensorBoard events: ")


@pytest.mark.parametrize("module, name", [("_hub", "load_model_config_from_path"), ("_builder", "load_pretrained")])
def test_weights_that_need_a_private_function_of_timm_name_the_version_that_has_it(trained, monkeypatch, module, name):
    student = Path(trained[0].out) / "student"
    model: Any = timm.create_model("test_efficientnet", num_classes=3)
    monkeypatch.delattr(f"timm.models.{module}.{name}")
    with pytest.raises(BadInput, match=rf"timm {timm.__version__} has no {module}.{name}, .* pip install timm=="):
        if module == "_hub":
            pretrained.read(student / "model.safetensors")
        else:
            other = pretrained.Weights("file", "file", {"another.weight": torch.ones(1)}, {})
            pretrained.load(model, other, "test_efficientnet", {"num_classes": 3}, ("a", "b", "c"), print)


def test_timm_looks_for_the_same_files_in_a_folder():
    assert pretrained.FILE_NAMES == pretrained.private_of_timm("_hub", "_PREFERRED_FILES")


def test_a_table_without_a_fingerprint_is_known_by_its_files(tmp_path):
    (tmp_path / "table.arrow").write_bytes(b"1")
    table = SimpleNamespace(cache_files=[{"filename": str(tmp_path / "table.arrow")}], _fingerprint="of datasets")
    assert tables._fingerprint(table) == "of datasets"
    del table._fingerprint
    first = tables._fingerprint(table)
    assert len(first) == 64 and tables._fingerprint(table) == first
    (tmp_path / "table.arrow").write_bytes(b"12")
    assert tables._fingerprint(table) != first


# ---- Windows and macOS, piece by piece -------------------------------------------------------------

def test_windows_has_no_kernels_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.BuildError, match="^there are no kernels for Windows$"):
        build.load(tmp_path / "any.cpp", [], seconds=1)


def test_apples_compiler_is_asked_with_openmp_and_then_without(monkeypatch, tmp_path):
    from torch.utils import cpp_extension
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some.cpp").write_text("int x;")
    asked = []

    def compiler(name, sources, extra_cflags, build_directory, is_python_module):
        asked.append(extra_cflags[:3])
        if "-fopenmp" in extra_cflags:
            raise RuntimeError("fatal error: 'omp.h' file not found")
        (Path(build_directory) / f"{name}.so").write_bytes(b"a library")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cpp_extension, "load", compiler)
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    build.load(tmp_path / "some.cpp", [], seconds=1)
    assert asked == [["-O3", "-Xclang", "-fopenmp"], ["-O3", "-fno-math-errno", *asked[1][2:]]] and len(loaded) == 1


@pytest.mark.parametrize("system, factor", [("linux", 1024), ("darwin", 1)])
def test_the_peak_of_memory_is_in_bytes(monkeypatch, system, factor):
    import resource
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
    assert limits.peak_memory() == 7 * factor
    monkeypatch.setitem(sys.modules, "resource", None)
    assert limits.peak_memory() is None


def test_frames_that_are_mapped_are_let_go_of_before_their_file_is_replaced(tmp_path, monkeypatch):
    """As on Windows, which replaces no mapped file."""
    kept, real = frames.KeptFrames([]), os.replace
    kept._splits.append(SimpleNamespace())      # type: ignore[arg-type]

    def replace(source, place):
        if kept._splits:
            raise PermissionError(13, "Permission denied")
        real(source, place)

    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "new").write_bytes(b"new")
    frames._put_in_place(tmp_path / "new", tmp_path / "old", kept)
    assert (tmp_path / "old").read_bytes() == b"new"


@pytest.mark.parametrize("pwrite", [True, False])
def test_threads_may_write_at_their_places_in_one_file(tmp_path, monkeypatch, pwrite):
    if not pwrite:
        monkeypatch.delattr(os, "pwrite")
    with open(tmp_path / "file", "wb") as file, ThreadPoolExecutor(4) as pool:
        for i in reversed(range(200)):
            pool.submit(write_at, file.fileno(), np.full((2, 8), i, np.uint8).data, 16 * i)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([i] * 16) for i in range(200))


def test_another_drive_has_no_relative_path(tmp_path, monkeypatch):
    def relpath(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    (tmp_path / "a").write_bytes(b"1")
    before = samples.files_fingerprint(str(tmp_path), [tmp_path / "a"])
    monkeypatch.setattr(os.path, "relpath", relpath)
    assert samples.files_fingerprint(str(tmp_path), [tmp_path / "a"]) != before
