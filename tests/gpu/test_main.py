"""The program runs its parts apart: each has a limit, and one that fails does not stop the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as program
from tests.gpu.__main__ import Part

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line_and_status_2(tmp_path, capsys):
    assert program.main([str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err == "tests.gpu: error: torch.cuda.is_available() is False: there is no GPU here\n"
    assert said.out == "" and not (tmp_path / "out").exists()


def test_an_unknown_part_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "REHEARSAL", True)
    assert program.main([str(tmp_path), "--only", "loss,speed"]) == 2
    assert "--only speed: known are tests, waits, compare-8, loss, ladder" in capsys.readouterr().err


def test_parts_end_well_by_an_error_at_their_limit_or_not_at_all_and_each_is_written(tmp_path, monkeypatch, capsys):
    """The parts are replaced by processes of a moment: what they are called with is what they do."""
    code = ("import json, sys, time; path, work = sys.argv[1], sys.argv[2]; exec(work); "
            "open(path, 'w').write(json.dumps([{'images_per_second': {'p50': 2.0}, 'line': 'a GPU'}]))")
    real = subprocess.Popen

    def popen(command, **settings):
        return real([sys.executable, "-c", code, command[3], command[-1]], **settings)

    monkeypatch.setattr(program.subprocess, "Popen", popen)
    parts = [Part("broken", 20, ["print('about to fail'); raise OSError('no driver')"]),
             Part("slow", 1, ["print('begun', flush=True); time.sleep(60)"]), Part("bench", 20, ["pass"])]
    results = program.run_all(parts, tmp_path)
    assert [each["ended"] for each in results] == ["by an error", "at its limit", "well"]
    broken, slow, bench = (json.loads((tmp_path / f"{part.name}.json").read_text()) for part in parts)
    assert broken["last_lines"][0] == "about to fail" and broken["last_lines"][-1] == "OSError: no driver"
    assert slow["last_lines"] == ["begun"] and slow["seconds"] < 15
    assert "last_lines" not in bench and bench["result"][0]["line"] == "a GPU"
    assert "bench: ended well after" in capsys.readouterr().out

    late, = program.run_all([parts[2]], tmp_path, total=5)
    assert late["ended"] == "before it began"


def test_the_limits_and_the_files_are_as_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "REHEARSAL", False)
    parts = program.parts(tmp_path)
    assert program.TOTAL <= 9 * 60 and max(part.seconds for part in parts) < program.TOTAL
    names = [part.name for part in parts]
    assert set(program.LONG) < set(names) and len(names) - len(program.LONG) + 1 <= 8   # and the summary


def test_it_needs_no_library_but_torch_timm_and_pytest():
    """Everything that it imports, and the collection of its tests, in a process where the others are missing."""
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "matplotlib", "jinja2", "tensorboard", "hypothesis", "xdist", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
find_spec = importlib.util.find_spec

def find(name, *rest):
    try:
        return find_spec(name, *rest)
    except ModuleNotFoundError:
        return None

importlib.util.find_spec = find
from tests.gpu import stand_ins
stand_ins.install()
import kd.bench.compare, kd.bench.loop, kd.bench.loss, tests.gpu.waits, tests.gpu.rank
from kd.tools import page
import pytest
sys.exit(pytest.main(["-o", "addopts=", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "cuda", "tests/gpu"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/gpu/test_precision.py::test_a_whole_run[auto]" in done.stdout
