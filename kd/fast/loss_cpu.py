"""Builds kd/fast/loss_cpu.cpp on first use (about 12 s), keeps the library in torch's extension cache, loads it.

The library registers the CPU kernels of the operators `kd::loss_and_grad_` and `kd::scale_` (kd/losses.py).
"""
import hashlib
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("loss_cpu.cpp")
# Named instruction sets, not -march=native: a cache on a shared disk must not hand one machine's code to another.
ISA = {"AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c",
                  "-mprefer-vector-width=512"],
       "AVX2": ["-mavx2", "-mfma", "-mf16c"]}


def load() -> str:
    """Loads the CPU kernels; "" when done, else one line that says why not."""
    # what cpp_extension logs (no CUDA_HOME, an unusual compiler) is no concern here; errors are raised, not logged
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        torch.ops.load_library(_library())
        return ""
    except Exception as error:  # a failed build must cost speed, never the run: no compiler, no ninja, a full disk
        lines = [line for line in str(error).splitlines() if "error: " in line or "not found" in line]
        return (lines or str(error).splitlines() or [repr(error)])[0].strip()[:200]
    finally:
        logger.setLevel(level)


def _library() -> Path:
    from torch.utils import cpp_extension  # slow to import

    # -fopenmp when compiling only: at link time the library then takes torch's own OpenMP, not a second pool
    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
             *ISA.get(torch.backends.cpu.get_cpu_capability(), [])]
    key = hashlib.sha256(repr((torch.__version__, flags)).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = Path(root) / "kd_fused_cpu" / f"{key}.so"
    if not library.exists():
        # Built aside and renamed into place: two processes may build at once, and one may be killed while it does;
        # neither ever sees half a library or waits for the other's lock.
        library.parent.mkdir(parents=True, exist_ok=True)
        if sys.stderr.isatty():  # the only long wait without a bar
            print("building kd/fast/loss_cpu.cpp, this once: about 12 s", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as build:
            cpp_extension.load("kd_fused_cpu", [str(SOURCE)], extra_cflags=flags, build_directory=build,
                               is_python_module=False)
            os.replace(next(Path(build).glob("*.so")), library)
    return library
