"""A faster training step on AVX-512 CPUs for timm's MobileNetV2-like models: same weights, same mathematics.

`accelerate(model)` changes the class of the blocks it understands (1x1, depthwise 3x3, BatchNorm, ReLU or ReLU6 or
nothing) and of the model's stem and head. In training mode on the CPU, in float32 or under bfloat16 autocast, their
forward then runs the fused kernels of blocks.cpp; otherwise, and in eval mode, timm's own forward runs. Parameters,
buffers and names are untouched, so checkpoints and saved folders know nothing of it. Forward hooks on the convolutions
and norms inside a fused block do not fire in training.
"""
import functools
import hashlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

INF = float("inf")
RANGES = {nn.Identity: (-INF, INF), nn.ReLU: (0.0, INF), nn.ReLU6: (0.0, 6.0)}  # act = clamp(z, lo, hi)


@functools.cache
def _ops():
    """The kernels, compiled at first use (15 s) into torch's extension cache. Raises RuntimeError or OSError."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise RuntimeError("the CPU has no AVX-512")
    # importing cpp_extension where there is no GPU logs a warning about CUDA_HOME, which is no concern here
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension           # slow to import
    # Named instruction sets, not -march=native: a cache on a shared disk must not hand one machine's code to another.
    # -fopenmp when compiling only: at link time the library then takes torch's own OpenMP, not a second pool.
    sets = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"]
    sets += ["avx512bf16"] * torch.cpu.get_capabilities()["avx512_bf16"]
    flags = ["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", *("-m" + name for name in sets)]
    source = Path(__file__).with_suffix(".cpp")
    key = hashlib.sha256(repr((torch.__version__, flags)).encode() + source.read_bytes()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    library = Path(root) / "kd_fast_cpu" / f"{key}.so"
    if not library.exists():                        # built aside, then renamed: a killed build leaves no lock behind
        library.parent.mkdir(parents=True, exist_ok=True)
        if sys.stderr.isatty():  # the only long wait without a bar
            print("building kd/fast/blocks.cpp, this once: about half a minute", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as build:
            cpp_extension.load("kd_fast_cpu", [str(source)], extra_cflags=flags, build_directory=build,
                               is_python_module=False)
            os.replace(next(Path(build).glob("*.so")), library)
    torch.ops.load_library(library)
    return torch.ops.kd_fast_cpu


class Layer(NamedTuple):
    """One convolution and the BatchNorm and activation after it."""
    conv: nn.Conv2d
    bn: BatchNormAct2d


class _Chain(torch.autograd.Function):
    """x → conv → bn → act → … → conv → bn → act (+ x). Keeps each convolution's output, nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, layers: list[Layer], image: bool, residual: bool, half: bool,
                *params: Tensor) -> Tensor:
        ctx.calls, saved = [], [x]
        y, norm, lo, hi = x, None, -INF, INF
        for conv, bn in layers:
            call = (norm, lo, hi, conv.weight, conv.stride[0], image and norm is None)
            y, norm = _ops().conv_forward(y, *call, bn.weight, bn.bias, bn.running_mean, bn.running_var,
                                          bn.momentum, bn.eps, half)
            assert bn.num_batches_tracked is not None
            bn.num_batches_tracked.add_(1)
            lo, hi = RANGES[type(bn.act)]
            ctx.calls.append(call)
            saved.append(y)
        ctx.save_for_backward(*saved, *params)
        ctx.end, ctx.residual = (norm, lo, hi), residual
        return _ops().norm_forward(y, norm, lo, hi, x if residual else None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors                   # raises if a weight was changed since
        grad = grad.contiguous(memory_format=torch.channels_last)
        n = len(ctx.calls)
        g, slope = _ops().norm_backward(grad, saved[n], *ctx.end)
        grads: list[Tensor | None] = []
        for i in reversed(range(n)):
            skip = grad if ctx.residual and i == 0 else None
            gamma_beta, kernel = (slope[3], slope[4]), ctx.calls[i][3]
            g, weight, slope = _ops().conv_backward(g, slope, saved[i + 1], saved[i], *ctx.calls[i], skip)
            if kernel.shape[1] == 1 or kernel.shape[2] == 1:  # one memory, two ways to count: DDP wants the parameter's
                weight = weight.as_strided(kernel.shape, kernel.stride())
            grads = [weight, *gamma_beta, *grads]
        return g, None, None, None, None, *grads


def _runs(x: Tensor) -> torch.dtype | None:
    """The storage type in which the fused path takes x, or None where timm's own must run."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
    return torch.float32 if x.dtype == torch.float32 else None


def _chain(x: Tensor, dtype: torch.dtype, layers: list[Layer], image: bool = False, residual: bool = False) -> Tensor:
    x = x.float() if image else x.to(dtype).contiguous(memory_format=torch.channels_last)
    params = [p for conv, bn in layers for p in (conv.weight, bn.weight, bn.bias)]
    return _Chain.apply(x, layers, image, residual, dtype == torch.bfloat16, *params)


def _fits(conv: nn.Module, bn: nn.Module, image: bool = False) -> bool:
    """Whether the kernels know this pair: 1x1 dense, 3x3 depthwise, or the first convolution, over the image."""
    if type(conv) is not nn.Conv2d or type(bn) is not BatchNormAct2d or conv.bias is not None:
        return False
    k, s = conv.kernel_size[0], conv.stride[0]
    dense = conv.groups == 1 and (k == s == 1 or image)
    depthwise = conv.groups == conv.in_channels == conv.out_channels and k == 3 and s in (1, 2)
    return ((dense or depthwise) and conv.kernel_size == (k, k) and conv.stride == (s, s) and conv.dilation == (1, 1)
            and conv.padding == (k // 2, k // 2) and k % 2 == 1 and conv.padding_mode == "zeros" and bn.affine
            and conv.weight.dtype == bn.weight.dtype == torch.float32
            and bn.track_running_stats and bn.momentum is not None and type(bn.act) in RANGES
            and type(bn.drop) is nn.Identity)


def _layers(block: nn.Module) -> list[Layer]:
    names = [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")]
    if isinstance(block, DepthwiseSeparableConv):
        names = [("conv_dw", "bn1"), ("conv_pw", "bn2")]
    return [Layer(getattr(block, c), getattr(block, b)) for c, b in names]


def _block_forward(self, x: Tensor) -> Tensor:
    dtype = _runs(x)
    if not self.training or dtype is None:
        return super(type(self), self).forward(x)
    fused = self.has_skip and type(self.drop_path) is nn.Identity and isinstance(self, InvertedResidual)
    out = _chain(x, dtype, _layers(self), residual=fused)
    return self.drop_path(out) + x if self.has_skip and not fused else out


class FastInvertedResidual(InvertedResidual):
    forward = _block_forward


class FastDepthwiseSeparableConv(DepthwiseSeparableConv):
    forward = _block_forward


class FastEfficientNet(EfficientNet):
    def forward_features(self, x: Tensor) -> Tensor:
        dtype = _runs(x)
        if not self.training or dtype is None or x.requires_grad or self.grad_checkpointing:
            return super().forward_features(x)
        x = _chain(x, dtype, [Layer(self.conv_stem, self.bn1)], image=True)
        x = self.blocks(x)
        return _chain(x, dtype, [Layer(self.conv_head, self.bn2)])


FAST = {InvertedResidual: FastInvertedResidual, DepthwiseSeparableConv: FastDepthwiseSeparableConv}


def accelerate(model: nn.Module, say: Callable[[str], object] = print) -> nn.Module:
    """Makes the training step of `model` faster, in place, where the kernels know its pieces; returns it.

    A model on another device than the CPU is left as it is.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    fast = [m for m in model.modules() if type(m) in FAST and m.conv_s2d is None
            and type(m.aa) is type(m.se) is nn.Identity and all(_fits(*layer) for layer in _layers(m))]
    whole = (type(model) is EfficientNet and _fits(model.conv_stem, model.bn1, image=True)
             and _fits(model.conv_head, model.bn2))
    if not fast and not whole:
        return model
    try:
        _ops()
    except (RuntimeError, OSError, ImportError) as e:
        say(f"fast_cpu: plain modules, since the fused kernels are not to be had ({str(e).splitlines()[0]})")
        return model
    for m in fast:
        m.__class__ = FAST[type(m)]
    if whole:
        model.__class__ = FastEfficientNet
    return model


def slow_in_bf16(model: nn.Module) -> bool:
    """Whether CPUs train `model` faster in float32: it has grouped convolutions that these kernels do not run."""
    if next(model.parameters()).device.type != "cpu":
        return False
    fused = {id(part) for m in model.modules() if type(m) in FAST.values() for part in m.modules()}
    return any(isinstance(m, nn.Conv2d) and m.groups > 1 and id(m) not in fused for m in model.modules())
