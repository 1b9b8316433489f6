"""The builder of C++ extensions: what it does when it cannot build, and that it builds only once."""

import ctypes
import os
import shutil
import sys
import sysconfig
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
    from torch.utils import cpp_extension
    loaded: list[Path] = []
    built = 0

    def compiler(name, sources, extra_cflags, build_directory, is_python_module):
        nonlocal built
        built += 1
        (Path(build_directory) / f"{name}.so").write_bytes(b"a library")

    monkeypatch.setattr(cpp_extension, "load", compiler)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build.load(source, ["-DONE"], seconds=7)
    build.load(source, ["-DONE"], seconds=7)
    assert built == 1 and loaded[0] == loaded[1] and loaded[0].read_bytes() == b"a library"
    assert capsys.readouterr().err.count("about 7 s") == 1  # a terminal shows what takes so long
    build.load(source, ["-DTWO"], seconds=7)
    assert built == 2 and loaded[2] != loaded[0]


@pytest.mark.parametrize("capability, flags", [
    ("AVX2", ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]),
    ("DEFAULT", ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]),
])
def test_the_flags_name_the_instruction_sets_and_the_width_of_the_vectors(capability, flags):
    assert build.instruction_flags(capability) == flags


COMPILER = ("gcc", "g++", "cc", "as", "ld")


@pytest.mark.skipif(not all(map(shutil.which, COMPILER)), reason="no GNU compiler")
@pytest.mark.skipif(not shutil.which("ninja", path=sysconfig.get_path("scripts")), reason="ninja is not from pip")
def test_an_environment_that_is_not_activated_builds_with_its_own_ninja(source, monkeypatch, tmp_path):
    """PATH has a compiler, not even as `c++`, and not the folder of this Python."""
    source.write_text('extern "C" int twice(int x) { return 2 * x; }')
    (tmp_path / "bin").mkdir()
    for name in COMPILER:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    assert not shutil.which("ninja") and not shutil.which("c++")
    build.load(source, [], seconds=1)
    library, = (tmp_path / "cache").rglob("*.so")
    assert ctypes.CDLL(str(library)).twice(21) == 42
    assert os.environ["PATH"] == str(tmp_path / "bin") and "CXX" not in os.environ


@pytest.mark.parametrize("path", ["/usr/bin", None])
def test_the_environment_is_the_same_after_a_build_that_fails(source, monkeypatch, path):
    from torch.utils import cpp_extension
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("PATH")
    if path:
        monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(shutil, "which", lambda name: {"g++": "/usr/bin/g++"}.get(name))
    before = dict(os.environ)
    seen: dict[str, str] = {}

    def compiler(*arguments, **named):
        seen.update(os.environ)
        raise RuntimeError("no space left")

    monkeypatch.setattr(cpp_extension, "load", compiler)
    with pytest.raises(build.BuildError, match="no space left"):
        build.load(source, [], seconds=1)
    assert dict(os.environ) == before
    folders = seen["PATH"].split(os.pathsep)
    assert folders[0] == (path or os.defpath.split(os.pathsep)[0]) and os.path.dirname(sys.executable) in folders[1:]
    assert seen["CXX"] == "g++"
