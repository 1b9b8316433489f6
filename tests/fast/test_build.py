"""The builder of C++ extensions: what it does when it cannot build, and that it builds only once."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd.fast import build


@pytest.fixture
def source(monkeypatch, tmp_path) -> Path:
    """A source that no compiler ever sees, and an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    path = tmp_path / "twice.cpp"
    path.write_text("int twice(int x) { return 2 * x; }")
    return path


def test_without_a_compiler_the_error_is_one_line_and_nothing_is_left_behind(source, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(build.BuildError) as caught:
        build.load(source, [], seconds=1)
    message = str(caught.value)
    assert "/nowhere/c++" in message and "\n" not in message and len(message) <= 200
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_library_in_the_cache_is_not_built_again_but_other_flags_make_another(source, monkeypatch, capsys):
    loaded: list[Path] = []
    compiled = []

    def compiler(arguments, cwd, **options):
        compiled.append(arguments)
        (Path(cwd) / "library.so").write_bytes(b"a library")
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(subprocess, "run", compiler)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build.load(source, ["-DONE"], seconds=7)
    build.load(source, ["-DONE"], seconds=7)
    assert len(compiled) == 2       # an object, then a library of it
    assert loaded[0] == loaded[1] and loaded[0].read_bytes() == b"a library"
    assert capsys.readouterr().err.count("about 7 s") == 1  # a terminal shows what takes so long
    build.load(source, ["-DTWO"], seconds=7)
    assert len(compiled) == 4 and loaded[2] != loaded[0]


@pytest.mark.parametrize("capability, flags", [
    ("AVX2", ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]),
    ("DEFAULT", ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]),
])
def test_the_flags_name_the_instruction_sets_and_the_width_of_the_vectors(capability, flags, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert build.compiler_flags()[-len(flags):] == flags


@pytest.mark.skipif(not shutil.which("g++"), reason="no GNU compiler")
def test_a_library_is_built_where_no_compiler_is_called_cpp(source, monkeypatch, tmp_path):
    """PATH has g++ and its parts, and nothing of this Python."""
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    (tmp_path / "bin").mkdir()
    for name in ("g++", "as", "ld"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    build.load(source, [], seconds=1)
    library, = (tmp_path / "cache").rglob("*.so")
    assert ctypes.CDLL(str(library)).twice(21) == 42
