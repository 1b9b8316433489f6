"""Compiles a C++ file on first use, keeps the library in a cache, and loads it: its operators are in torch.ops then.

A later process finds the library there and only loads it. The cache is the folder that TORCH_EXTENSIONS_DIR names, else
torch_extensions in ~/.cache, where torch keeps such libraries too.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from kd import first_error

# Instruction sets by name, not -march=native: a cache on a shared disk must not hand the code of one
# machine to another that cannot run it.
INSTRUCTION_SETS = {
    "AVX2": ("avx2", "fma", "f16c"),
    "AVX512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
}
TORCH = Path(torch.__file__).parent
HEADERS = [f"-isystem{TORCH}/include", f"-isystem{TORCH}/include/torch/csrc/api/include"]


class BuildError(Exception):
    """A library cannot be compiled or loaded. The message is one line that says why."""


def load(source: Path, flags: Sequence[str], seconds: int) -> None:
    """Compile `source` unless the cache has it, and load it.

    flags     for the compiler, beside those of `compiler_flags`
    seconds   how long the build takes, for the line that a terminal shows meanwhile

    Raises BuildError, whatever the reason: no compiler, a full disk. A kernel that cannot be built must
    cost a run its speed, never its life.
    """
    try:
        torch.ops.load_library(_library(source, [*compiler_flags(), *flags], seconds))
    except Exception as error:
        raise BuildError(first_error(error)) from error


def compiler_flags() -> list[str]:
    """For every library: optimisation, this CPU's instruction sets, and the width of at::vec's vectors."""
    capability = torch.backends.cpu.get_cpu_capability()
    sets = [f"-m{name}" for name in INSTRUCTION_SETS.get(capability, ())]
    return ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", *sets,
            f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]


def _library(source: Path, flags: Sequence[str], seconds: int) -> Path:
    """The compiled library in the cache; built now if it is not there."""
    # A new version of torch, other flags or another source give another file name.
    facts = repr((torch.__version__, flags)).encode() + source.read_bytes()
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions").expanduser()
    library = folder / f"kd_{source.stem}" / f"{hashlib.sha256(facts).hexdigest()[:16]}.so"
    if library.exists():
        return library

    # Built in a folder aside, then renamed into place. Two processes may build at the same time, and
    # one may be killed meanwhile: nobody ever loads half a library.
    library.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():
        print(f"building kd/fast/{source.name}, only this once: about {seconds} s", file=sys.stderr, flush=True)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        # In two steps, because the linker must not see -fopenmp: the library uses the OpenMP that torch
        # has loaded, so that no second pool of threads comes up.
        for arguments in ([*flags, *HEADERS, "-c", str(source), "-o", "object.o"],
                          ["-shared", "object.o", "-o", "library.so", f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]):
            done = subprocess.run([*compiler.split(), *arguments], cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(done.stderr)
        os.replace(Path(scratch) / "library.so", library)
    return library
