"""The Triton kernels without a GPU: interpreted on the CPU, and compiled ahead of time for the GPUs that count.

With a GPU, tests/fast/test_fused_loss.py runs the compiled kernels.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kd.fast import fused_loss_triton  # noqa: E402

# Runs the tests of the loss in a process of its own, because Triton decides at import whether it interprets. There the
# interpreted kernels take the place of the CPU's C++ ones. Once each row fits into row_kernel, then none does.
# -n 0: in this very process, where the kernels are replaced. --noconftest: no test of the loss needs what it imports.
INTERPRET = """
import sys, pytest
from kd.fast import fused_loss, fused_loss_triton
fused_loss_triton.register("CPU")
fused_loss.load_kernel = lambda device: ("Triton", "")
for kernel, max_row, block, tests in (("row_kernel", 32768, 4096, sys.argv[1]), ("block_kernel", 0, 1024, sys.argv[2])):
    fused_loss_triton.MAX_ROW, fused_loss_triton.BLOCK = max_row, block
    status = pytest.main(["-n", "0", "-p", "no:cacheprovider", "--noconftest", "-k", tests,
                          "tests/test_losses.py", "tests/fast/test_fused_loss.py"])
    print(f"{kernel}: status {int(status)}")
"""
BOTH_KERNELS = "sizes_and_temperatures or kinds or without_a_label or without_labels or no_label_is_read"
ROW_KERNEL = f"{BOTH_KERNELS} or mixed or fp16 or any_shape or twice"
LARGE = "256 or 41-21841"  # many rows, or two long ones: the same work again, which takes long


@pytest.fixture(scope="module")
def interpreted() -> str:
    """What pytest prints in that process."""
    command = [sys.executable, "-W", "ignore", "-c", INTERPRET,
               *(f"({tests}) and not ({LARGE})" for tests in (ROW_KERNEL, BOTH_KERNELS))]
    run = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], env=os.environ | {"TRITON_INTERPRET": "1"},
                         capture_output=True, text=True, timeout=300)
    return run.stdout + run.stderr


@pytest.mark.parametrize("kernel, at_least", [("row_kernel", 43), ("block_kernel", 29)])
def test_interpreted(interpreted, kernel, at_least):
    output = interpreted.split(f"{kernel}: status")[0]
    assert f"{kernel}: status 0\n" in interpreted, output[-6000:]
    passed = re.findall(r"(\d+) passed", output)
    assert int(passed[-1]) >= at_least


# --- ahead of time ---------------------------------------------------------------------------------------------------


def compiled(kernel, block, warps, capability, dtype, align):
    """The kernel as Triton would compile it at a launch with tensors of this dtype, all terms taking part."""
    names = kernel.arg_names
    logits = {"s_ptr": dtype, "t_ptr": dtype, "grad_ptr": dtype}
    pointers = logits | {"label_ptr": "*i64", "loss_ptr": "*fp32"}
    ints = dict.fromkeys(("C", "s_stride", "t_stride", "grad_stride"), "i32")
    floats = dict.fromkeys(("T", "kd_weight", "row_weight", "gradient_scale"), "fp32")
    constants = {"CE": True, "KL": True, "ALIGN": align, "BLOCK": block}
    signature = pointers | ints | floats | dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(names)
    source = ASTSource(fn=kernel, signature={name: signature[name] for name in names},
                       constexprs={(names.index(name),): value for name, value in constants.items()},
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def machine_code(binary, tmp_path) -> str:
    """SASS, by the disassembler that comes with Triton."""
    import triton.backends.nvidia
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    env = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}"}  # it calls nvdisasm, which lies beside it
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True, env=env).stdout


def words(pattern: str, code: str) -> int:
    """Bits that one thread moves by the instructions of this kind, as they stand in the code, in units of 16."""
    sizes = {"U8": 8, "U16": 16, "64": 64, "128": 128}
    moves = re.findall(pattern + r"\.E((?:\.\w+)*)", code)
    return sum(next((sizes[part] for part in move.split(".") if part in sizes), 32) for move in moves) // 16


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreting: nothing is compiled")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("C, align", [(1000, 8), (1271, 1), (8192, 8), (131072, 8)])
def test_ahead_of_time(C, align, dtype, capability, tmp_path):
    """No spills. Global memory sees the student and the teacher read once (twice in blocks) and the gradient written
    once, besides the label (64 bits) in and the row's loss (32 bits) out."""
    kernel, block, warps = fused_loss_triton.layout(C)
    code = machine_code(compiled(kernel, block, warps, capability, dtype, align), tmp_path)
    assert "EXIT" in code
    assert not re.findall(r"\b(LDL|STL)\b", code), "registers spill"
    elements = block // (32 * warps) * (2 if dtype == "*fp32" else 1)  # of one row, each thread's, in 16 bits
    sweeps = 1 if kernel is fused_loss_triton.row_kernel else 2
    assert words("LDG", code) == 2 * sweeps * elements + 4
    assert words("STG", code) == elements + 2
    if align == 8:
        wide = len(re.findall(r"LDG\.E[\w.]*\.128", code))
        assert wide * 8 == 2 * sweeps * elements, "every logit is to come in 16 bytes at a time"


def test_layout_covers_every_row():
    for C in (1, 2, 3, 255, 256, 1000, 8192, 8193, 131072, 1_000_000):
        kernel, block, warps = fused_loss_triton.layout(C)
        assert (kernel is fused_loss_triton.block_kernel or block >= C) and 1 <= warps <= 32
