"""The fused training step against timm's own modules: outputs, gradients, running statistics, names, determinism."""

import copy
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd.fast import blocks, build

NAMES = ["mobilenetv2_035", "mobilenetv2_050"]  # channel counts that are no multiple of 16 among them
pytestmark = pytest.mark.skipif(bool(blocks.unavailable()), reason=blocks.unavailable())
on_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="about x86 processors")


def models(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same weights three times: plain in float64, plain, fused."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=3).to(memory_format=torch.channels_last)
    fused = blocks.accelerate(copy.deepcopy(plain))
    assert type(fused) is not type(plain)
    return copy.deepcopy(plain).double(), plain, fused


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    dtype = next(model.parameters()).dtype
    model.train()
    logits = model(x.to(dtype).contiguous(memory_format=torch.channels_last))
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=dtype).view_as(logits)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    flat = torch.cat([gradient.double().flatten() for gradient in gradients])
    return logits.double(), flat, {key: value.double() for key, value in model.named_buffers()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 3, 64, 64), (2, 3, 33, 47), (8, 3, 32, 32),
                                   (6, 3, 128, 128)])  # so large that results are stored past the caches
def test_a_training_step_is_the_plain_one_within_rounding(name, shape):
    exact, plain, fused = models(name)
    # Float32 rounding moves a value across a kink of ReLU6 now and then, and the gradient jumps. That happens to the
    # plain model alike, with one input and not with another. A wrong kernel is wrong with each.
    for seed in range(1, 6):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        (a, ga, ba), (b, gb, bb), (c, gc, bc) = (step(model, x) for model in (exact, plain, fused))
        assert (c - a).norm() <= 10 * (b - a).norm() + 1e-6 * a.norm()      # these have no jump
        for key, value in ba.items():
            assert torch.allclose(bc[key], value, rtol=1e-4, atol=3 * (bb[key] - value).abs().max().item() + 1e-6), key
        if (gc - ga).norm() <= 10 * (gb - ga).norm() + 1e-6 * ga.norm():
            break
    else:
        pytest.fail("the gradients differ by more than rounding, with each of five inputs")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_closer_to_float64_than_those_of_the_plain_modules(name):
    exact, plain, fused = models(name)
    errors = []
    for seed in range(5):
        x = torch.randn((6, 3, 64, 64), generator=torch.Generator().manual_seed(seed))
        (a, ga, _), (b, gb, _), (c, gc, _) = (step(model, x) for model in (exact, plain, fused))
        errors.append([(b - a).norm().item(), (c - a).norm().item(), (gb - ga).norm().item(), (gc - ga).norm().item()])
    plain_logits, fused_logits, plain_gradient, fused_gradient = torch.tensor(errors).median(dim=0).values
    assert fused_logits < plain_logits and fused_gradient < plain_gradient


@pytest.mark.skipif(not blocks.has_bf16(), reason="the kernels know bfloat16 on AVX-512 only")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 3, 64, 64), (7, 3, 65, 47)])     # the second leaves rows over
def test_in_bf16_the_step_is_no_less_exact_than_the_plain_modules_in_bf16(name, shape):
    exact, plain, fused = models(name)
    errors = []
    for seed in range(1, 6):        # of one batch, the rounding of either may be the smaller one by chance
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        a, ga, ba = step(exact, x)
        with torch.autocast("cpu", torch.bfloat16):
            (b, gb, bb), (c, gc, bc) = step(plain, x), step(fused, x)
        errors.append([(logits - a).norm().item() for logits in (b, c)] + [(g - ga).norm().item() for g in (gb, gc)])
    plain_logits, fused_logits, plain_gradient, fused_gradient = np.mean(errors, axis=0)
    assert 0 < fused_logits <= 1.5 * plain_logits and fused_gradient <= 1.5 * plain_gradient
    assert (c - a).norm() > (step(fused, x)[0] - a).norm()  # it did run in bf16
    for key, value in ba.items():
        assert torch.allclose(bc[key], value, rtol=2e-2, atol=2 * (bb[key] - value).abs().max().item() + 1e-3), key


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    not blocks.has_bf16(), reason="the kernels know bfloat16 on AVX-512 only"))])
@settings(max_examples=100, deadline=None)
@given(rows=st.integers(2, 3000), channels=st.integers(1, 100), out=st.integers(1, 100), seed=st.integers(0, 999))
def test_a_1x1_convolution_of_any_size_is_exact_on_small_integers(dtype, rows, channels, out, seed):
    """Their sums are exact in float32, so a lost row, a column too many or a wrong pair of bf16 shows.

    The kernels take 288 rows of 100 channels and 100 outputs at once.
    """
    generator = torch.Generator().manual_seed(seed)
    x, weight, g = (torch.randint(-2, 3, shape, generator=generator).float()
                    for shape in ((rows, channels), (out, channels), (rows, out)))
    a, kernel, grad = x.to(dtype)[:, :, None, None], weight[:, :, None, None], g.to(dtype)[:, :, None, None]
    line = (None, -blocks.INF, blocks.INF, kernel, 1, False)        # no norm before it
    one, zero = torch.ones(out), torch.zeros(out)
    y, _ = torch.ops.kd_blocks.conv_forward(a, *line, one, zero, zero.clone(), one.clone(), 0.1, 1e-5,
                                            dtype == torch.bfloat16)
    slope = torch.stack([one, zero, zero, zero, zero])              # dL/dy is g itself
    g_in, dw, _ = torch.ops.kd_blocks.conv_backward(grad, slope, y, a, *line, None)
    assert torch.equal(y[:, :, 0, 0], (x @ weight.T).to(dtype))
    assert torch.equal(g_in[:, :, 0, 0], (g @ weight).to(dtype))
    assert torch.equal(dw[:, :, 0, 0], g.T @ x)


def test_under_autocast_a_processor_without_bf16_kernels_runs_the_plain_modules(monkeypatch):
    monkeypatch.setattr(blocks, "has_bf16", lambda: False)
    _, plain, fused = models("mobilenetv2_035")
    x = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        (a, ga, _), (b, gb, _) = step(plain, x), step(fused, x)
    assert torch.equal(a, b) and torch.equal(ga, gb)
    assert blocks.slow_in_bf16(fused)


@pytest.mark.parametrize("name, slow", [("mobilenetv2_050", False), ("test_resnet", False),
                                        ("efficientnet_lite0", True)])
def test_plain_grouped_convolutions_are_slow_in_bf16(name, slow, monkeypatch):
    monkeypatch.setattr(blocks, "has_bf16", lambda: True)
    model = timm.create_model(name, num_classes=3)
    assert blocks.slow_in_bf16(blocks.accelerate(model)) == slow


def test_weights_keep_their_names_and_evaluation_is_untouched():
    _, plain, fused = models("mobilenetv2_050")
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    x = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert torch.equal(fused.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_step_gives_the_same_bits(bf16):
    _, _, fused = models("mobilenetv2_050")
    start, x = copy.deepcopy(fused.state_dict()), torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        first = step(fused, x)
        for _ in range(3):
            fused.load_state_dict(start)
            again = step(fused, x)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_model_of_other_pieces_is_left_alone():
    model = timm.create_model("test_resnet", num_classes=3)
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in blocks.accelerate(model).modules()] == before


# ---- other processors than this one ----------------------------------------------------------------

def run_as(capability: str, *command: str) -> str:
    """What Python prints on a processor whose instruction sets end at `capability`."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, *command], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@on_x86
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "AVX2", reason="the other tests run it")
def test_the_code_for_avx2_is_as_exact_where_the_processor_could_do_more():
    chosen = "plain_one_within_rounding and 035 or closer_to_float64 and 050"
    out = run_as("avx2", "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__, "-k", chosen)
    assert "5 passed" in out and "skipped" not in out


@pytest.mark.skipif(not blocks.has_matrix_unit(), reason="the other tests run without one")
def test_the_code_without_a_matrix_unit_is_as_exact_where_the_processor_has_one():
    out = run_as("avx512", "-c", f"import pytest; from kd.fast import blocks; blocks.has_matrix_unit = lambda: False\n"
                 f"pytest.main(['-n', '0', '-p', 'no:cacheprovider', {__file__!r}, '-k', 'less_exact or any_size'])\n"
                 "import torch; print('in tiles:', torch.ops.kd_blocks.in_tiles())")
    assert "6 passed" in out and "skipped" not in out and "in tiles: False" in out


def test_the_matrix_unit_is_used_where_there_is_one():
    assert torch.ops.kd_blocks.in_tiles() == (blocks.has_bf16() and blocks.has_matrix_unit())


@on_x86
def test_a_processor_without_avx2_keeps_the_plain_modules():
    out = run_as("default", "-c", "import timm; from kd.fast import blocks\n"
                 "model = blocks.accelerate(timm.create_model('mobilenetv2_035', num_classes=3))\n"
                 "print(type(model).__name__, blocks.unavailable())")
    assert out == "EfficientNet the fused blocks need a CPU with AVX2 or AVX-512; torch sees DEFAULT\n"


@on_x86
@pytest.mark.skipif(blocks.has_matrix_unit(), reason="the other tests run it")
@pytest.mark.skipif(not shutil.which("g++"), reason="no GNU compiler")
def test_the_code_for_other_processors_compiles_and_multiplies_bf16(tmp_path, monkeypatch):
    from torch.utils import cpp_extension
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    probe = subprocess.run(["g++", *blocks.MATRIX_UNIT, "-E", "-x", "c++", os.devnull], capture_output=True)
    known = probe.returncode == 0
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    subprocess.run(["g++", "-S", str(Path(blocks.__file__).with_suffix(".cpp")),
                    *build.compiler_flags(), "-O0", "-mavx512bf16", *(blocks.MATRIX_UNIT if known else []),
                    "-o", "blocks.s", *(f"-I{folder}" for folder in folders)], cwd=tmp_path, check=True)
    assembly = (tmp_path / "blocks.s").read_text()
    assert "vdpbf16ps" in assembly and "zmm" in assembly and ("tdpbf16ps" in assembly) == known


@on_x86
def test_a_compiler_that_does_not_know_the_matrix_unit_makes_the_kernels_without(monkeypatch):
    built = []

    def load(source, flags, seconds):
        if set(blocks.MATRIX_UNIT) <= set(flags):
            raise build.BuildError("c++: error: unrecognized option '-mamx-tile'")
        built.append(flags)

    monkeypatch.setattr(build, "load", load)
    monkeypatch.setattr(blocks, "has_matrix_unit", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert blocks.unavailable.__wrapped__() == "" and len(built) == 1


def test_where_nothing_can_be_compiled_the_reason_is_one_line_and_models_stay_plain(monkeypatch):
    def fails(*arguments, **named):
        raise build.BuildError("c++: not found")

    monkeypatch.setattr(build, "load", fails)
    monkeypatch.setattr(blocks, "unavailable", blocks.unavailable.__wrapped__)  # without what it remembers
    assert blocks.unavailable() == "the fused blocks cannot be compiled: c++: not found"
    model = timm.create_model("mobilenetv2_035", num_classes=3)
    assert type(blocks.accelerate(model)) is type(timm.create_model("mobilenetv2_035"))
