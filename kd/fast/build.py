"""Compiles a C++ extension on first use, keeps the library in torch's extension cache, and loads it.

A later process finds the library there and only loads it. The cache is the folder that
TORCH_EXTENSIONS_DIR names, else ~/.cache/torch_extensions.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kd import first_error

# Instruction sets by name, not -march=native: a cache on a shared disk must not hand the code of one
# machine to another that cannot run it.
INSTRUCTION_SETS = {
    "AVX2": ("avx2", "fma", "f16c"),
    "AVX512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
}


def instruction_flags(capability: str) -> list[str]:
    """Flags for one of torch's CPU capabilities: the instruction sets, and the width of at::vec's vectors."""
    sets = [f"-m{name}" for name in INSTRUCTION_SETS.get(capability, ())]
    return [*sets, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]


class BuildError(Exception):
    """An extension cannot be compiled or loaded. The message is one line that says why."""


def load(source: Path, flags: Sequence[str], seconds: int) -> None:
    """Compile `source` unless the cache has it, and load it: its operators are in torch.ops then.

    flags     for the compiler, beside -O3, OpenMP and the instruction sets of this CPU
    seconds   how long the build takes, for the line that a terminal shows meanwhile

    Raises BuildError, whatever the reason: no compiler, no ninja, a full disk. A kernel that cannot
    be built must cost a run its speed, never its life.
    """
    if sys.platform == "win32":     # its compiler takes other flags, and a library in use cannot be renamed
        raise BuildError("there are no kernels for Windows")
    # cpp_extension warns about a missing CUDA_HOME and an unusual compiler. Neither matters here, and
    # errors are raised, not logged.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for openmp in _openmp_flags():
            try:
                torch.ops.load_library(_library(source, ["-O3", *openmp, "-fno-math-errno", *flags], seconds))
                return
            except Exception as error:
                failure = error
        raise BuildError(first_error(failure)) from failure
    finally:
        logger.setLevel(level)


def _openmp_flags() -> list[list[str]]:
    """The ways of asking for OpenMP, in the order in which they are tried.

    The flags are for the compiler only. The linker does not see them, so that the library uses the
    OpenMP that torch has loaded, and no second pool of threads comes up.

    Apple's compiler knows it only behind -Xclang, and only where somebody has installed omp.h. Without
    it, at::parallel_for runs in one thread.
    """
    return [["-Xclang", "-fopenmp"], []] if sys.platform == "darwin" else [["-fopenmp"]]


def _library(source: Path, flags: Sequence[str], seconds: int) -> Path:
    """The compiled library in the cache; built now if it is not there."""
    from torch.utils import cpp_extension  # slow to import

    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*flags, *instruction_flags(capability)]

    # A new version of torch, other flags or another source give another file name.
    facts = repr((torch.__version__, flags)).encode() + source.read_bytes()
    digest = hashlib.sha256(facts).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = Path(root) / f"kd_{source.stem}" / f"{digest}.so"
    if library.exists():
        return library

    # Built in a folder aside, then renamed into place. Two processes may build at the same time, and
    # one may be killed meanwhile: nobody ever loads half a library or waits for a stale lock.
    library.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():
        print(f"building kd/fast/{source.name}, only this once: about {seconds} s",
              file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, _ninja_and_compiler():
        cpp_extension.load(f"kd_{source.stem}", [str(source)], extra_cflags=flags,
                           build_directory=folder, is_python_module=False)
        os.replace(next(Path(folder).glob("*.so")), library)
    return library


_environment_lock = threading.Lock()     # os.environ belongs to all threads


@contextlib.contextmanager
def _ninja_and_compiler() -> Iterator[None]:
    """Name ninja and a compiler in the environment, where cpp_extension looks for them; undone afterwards.

    ninja: an IDE, cron, a Jupyter kernel or pipx runs the Python of a virtual environment without
    activating it. The programs that pip installed there are then not on PATH.
    compiler: cpp_extension takes CXX, else `c++`. Some machines have only `g++`.
    """
    folders = [os.path.dirname(sys.executable or ""), sysconfig.get_path("scripts"),
               sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))]
    with _environment_lock:
        # The folders come last, so that PATH still finds every other program where it did before.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), *filter(None, folders)])
        changes = {"PATH": path}
        if "CXX" not in os.environ and not shutil.which("c++") and shutil.which("g++"):
            changes["CXX"] = "g++"
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
