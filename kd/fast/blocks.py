"""A fused training step for timm's MobileNetV2-like models on CPUs with AVX2 or AVX-512.

A plain step on a CPU waits for memory. Around each convolution, BatchNorm and ReLU6 read and write
the whole activation some ten times, forward and back. The kernels of blocks.cpp do their work while
the activation passes through the cache, as its header explains. Weights and mathematics are the same.

`accelerate(model)` changes the class of the blocks that the kernels can run: 1x1 and depthwise 3x3
convolutions, each followed by BatchNorm and ReLU, ReLU6 or nothing. The model's stem and head change
likewise. The kernels run in training mode on the CPU, in float32 or, with AVX-512, under bfloat16
autocast. In all other cases, such as eval mode, timm's own forward runs.

Parameters, buffers and their names stay, so checkpoints and saved folders do not depend on this file.
One thing is lost: in training, forward hooks on the convolutions and norms inside a block do not fire.
"""

import functools
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from timm.layers import BatchNormAct2d
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from kd import one_line
from kd.fast import build, fused_loss

try:
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
    NOT_FOUND = ""
except ImportError as error:    # private to timm, so another version may have moved them
    NOT_FOUND = one_line(error)

    class InvertedResidual(nn.Module):          # type: ignore[no-redef]
        """No model has this one."""

    class DepthwiseSeparableConv(nn.Module):    # type: ignore[no-redef]
        """Nor this one."""

MATRIX_UNIT = ["-mamx-tile", "-mamx-bf16"]      # flags of the compiler
INF = float("inf")
# The activations that the kernels know, as bounds: act(z) = clamp(z, low, high).
BOUNDS = {nn.Identity: (-INF, INF), nn.ReLU: (0.0, INF), nn.ReLU6: (0.0, 6.0)}


@functools.cache
def unavailable() -> str:
    """Why the kernels cannot run on this machine, in one line; "" where they can.

    The first call compiles the C++ source, which makes torch.ops.kd_blocks.
    """
    if NOT_FOUND:
        return f"the fused blocks do not know this version of timm ({NOT_FOUND})"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return f"the fused blocks need a CPU with AVX2 or AVX-512; torch sees {capability}"
    source = Path(__file__).with_name("blocks.cpp")
    flags = ["-ffp-contract=fast"]
    if capability == "AVX512" and torch.cpu.get_capabilities()["avx512_bf16"]:
        flags += ["-mavx512bf16"]
    # An old compiler does not know the matrix unit. It then makes the kernels without it.
    tries = [[*flags, *MATRIX_UNIT], flags] if capability == "AVX512" and has_matrix_unit() else [flags]
    for chosen in tries:
        try:
            build.load(source, chosen, seconds=30)
            return ""
        except build.BuildError as error:
            reason = f"the fused blocks cannot be compiled: {error}"
    return reason


def kernels_missing(device_type: str) -> str:
    """Why a run on "cpu", "cuda", … cannot have all of its kernels, in one line; "" where it can.

    On the CPU these are the fused loss and blocks; on a GPU only the loss.
    """
    _, reason = fused_loss.load_kernel(device_type)
    return reason or (unavailable() if device_type == "cpu" else "")


def has_matrix_unit() -> bool:
    """Whether the CPU multiplies bfloat16 in a matrix unit (Intel's AMX). Asks Linux, which has to let the process."""
    return torch.cpu.get_capabilities().get("amx_bf16", False) and torch.cpu._init_amx()


def instructions() -> str:
    """For people: what the CPU computes with. Rounding depends on it."""
    return torch.backends.cpu.get_cpu_capability() + (" with AMX" if has_bf16() and has_matrix_unit() else "")


def has_bf16() -> bool:
    """Whether the kernels store and multiply bfloat16: with AVX-512 only."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


# ---- a chain of convolutions as one autograd function -----------------------------------------------

class Layer(NamedTuple):
    """One convolution, and the BatchNorm and activation after it."""

    conv: nn.Conv2d
    bn: BatchNormAct2d


class _Chain(torch.autograd.Function):
    """x → conv → bn → act → … → conv → bn → act (+ x). Saves only the output of each convolution."""

    @staticmethod
    def forward(ctx, x: Tensor, layers: list[Layer], is_image: bool, residual: bool, bf16: bool,
                *params: Tensor) -> Tensor:
        ops = torch.ops.kd_blocks
        ctx.calls, saved = [], [x]
        y, norm, low, high = x, None, -INF, INF
        for conv, bn in layers:
            # A kernel applies the norm and activation of the layer before, while it reads its y.
            call = (norm, low, high, conv.weight, conv.stride[0], is_image and norm is None)
            y, norm = ops.conv_forward(y, *call, bn.weight, bn.bias, bn.running_mean, bn.running_var,
                                       bn.momentum, bn.eps, bf16)
            assert bn.num_batches_tracked is not None
            bn.num_batches_tracked.add_(1)
            low, high = BOUNDS[type(bn.act)]
            ctx.calls.append(call)
            saved.append(y)
        ctx.save_for_backward(*saved, *params)
        ctx.last_norm, ctx.residual = (norm, low, high), residual
        return ops.norm_forward(y, norm, low, high, x if residual else None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        ops = torch.ops.kd_blocks
        saved = ctx.saved_tensors  # raises an error if a weight has changed since forward
        grad = grad.contiguous(memory_format=torch.channels_last)
        n = len(ctx.calls)
        g, slope = ops.norm_backward(grad, saved[n], *ctx.last_norm)
        grads: list[Tensor | None] = []
        for i in reversed(range(n)):
            skip = grad if ctx.residual and i == 0 else None
            gamma_beta, kernel = (slope[3], slope[4]), ctx.calls[i][3]
            g, weight, slope = ops.conv_backward(g, slope, saved[i + 1], saved[i], *ctx.calls[i], skip)
            # A 1x1 or depthwise kernel lies in memory the same way in every format, but its strides
            # differ. DistributedDataParallel wants those of the parameter.
            if kernel.shape[1] == 1 or kernel.shape[2] == 1:
                weight = weight.as_strided(kernel.shape, kernel.stride())
            grads = [weight, *gamma_beta, *grads]
        return g, None, None, None, None, *grads


def _run_chain(x: Tensor, dtype: torch.dtype, layers: list[Layer], is_image: bool = False,
               residual: bool = False) -> Tensor:
    """The layers on x; activations are stored in `dtype`, float32 or bfloat16."""
    x = (x.float() if is_image else x.to(dtype)).contiguous(memory_format=torch.channels_last)
    params = [p for conv, bn in layers for p in (conv.weight, bn.weight, bn.bias)]
    return _Chain.apply(x, layers, is_image, residual, dtype == torch.bfloat16, *params)


def _storage_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which the kernels store activations of x, or None where they cannot run on x."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    if x.dtype not in (torch.float32, torch.bfloat16):
        return None
    if torch.is_autocast_enabled("cpu"):
        bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16 and has_bf16()
        return torch.bfloat16 if bf16 else None
    return torch.float32 if x.dtype == torch.float32 else None


# ---- timm's modules with a fused forward ------------------------------------------------------------

def _layer_names(block: nn.Module) -> list[tuple[str, str]]:
    if isinstance(block, DepthwiseSeparableConv):
        return [("conv_dw", "bn1"), ("conv_pw", "bn2")]
    return [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")]


def _layers(block: nn.Module) -> list[Layer]:
    return [Layer(getattr(block, conv), getattr(block, bn)) for conv, bn in _layer_names(block)]


def _block_forward(block, x: Tensor, timm_forward: Callable[[Tensor], Tensor]) -> Tensor:
    dtype = _storage_dtype(x)
    if not block.training or dtype is None:
        return timm_forward(x)
    # The kernels add the residual, unless timm drops the whole path at random (drop_path).
    residual = (block.has_skip and type(block.drop_path) is nn.Identity
                and isinstance(block, InvertedResidual))
    out = _run_chain(x, dtype, _layers(block), residual=residual)
    return block.drop_path(out) + x if block.has_skip and not residual else out


class FusedInvertedResidual(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        return _block_forward(self, x, super().forward)


class FusedDepthwiseSeparableConv(DepthwiseSeparableConv):
    def forward(self, x: Tensor) -> Tensor:
        return _block_forward(self, x, super().forward)


class FusedEfficientNet(EfficientNet):
    """Stem and head are fused; the blocks between them are modules of their own."""

    def forward_features(self, x: Tensor) -> Tensor:
        dtype = _storage_dtype(x)
        if not self.training or dtype is None or x.requires_grad or self.grad_checkpointing:
            return super().forward_features(x)
        x = _run_chain(x, dtype, [Layer(self.conv_stem, self.bn1)], is_image=True)
        x = self.blocks(x)
        return _run_chain(x, dtype, [Layer(self.conv_head, self.bn2)])


FUSED_BLOCKS = {InvertedResidual: FusedInvertedResidual,
                DepthwiseSeparableConv: FusedDepthwiseSeparableConv}


# ---- which modules of a model the kernels can run ---------------------------------------------------

def accelerate(model: nn.Module) -> nn.Module:
    """Make the training step of `model` faster, in place, where the kernels can run it; returns it.

    Nothing happens to a model on another device than the CPU, to a model of other blocks, or where the
    kernels are `unavailable`. The first call compiles them (half a minute).
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    blocks = [module for module in model.modules() if _is_supported_block(module)]
    stem_and_head = (type(model) is EfficientNet and hasattr(model, "grad_checkpointing")
                     and _has_parts(model, "conv_stem", "bn1", "blocks", "conv_head", "bn2",
                                    "global_pool", "classifier")
                     and _is_supported(model.conv_stem, model.bn1, is_image=True)
                     and _is_supported(model.conv_head, model.bn2))
    if not (blocks or stem_and_head) or unavailable():
        return model
    for block in blocks:
        block.__class__ = FUSED_BLOCKS[type(block)]
    if stem_and_head:
        model.__class__ = FusedEfficientNet
    return model


def _has_parts(module: nn.Module, *names: str) -> bool:
    """Whether these are its parts, and there are no others: another version of timm may compute more."""
    return {name for name, _ in module.named_children()} == set(names)


def _is_supported_block(block: nn.Module) -> bool:
    if type(block) not in FUSED_BLOCKS:
        return False
    layers = [name for names in _layer_names(block) for name in names]
    return (_has_parts(block, *layers, "aa", "se", "drop_path") and hasattr(block, "has_skip")
            and type(block.aa) is type(block.se) is nn.Identity
            and all(_is_supported(*layer) for layer in _layers(block)))


def _is_supported(conv: nn.Module, bn: nn.Module, is_image: bool = False) -> bool:
    """Whether the kernels can run this convolution and the norm after it.

    The convolution is a dense 1x1, a depthwise 3x3, or the model's first one, over the image.
    """
    if type(conv) is not nn.Conv2d or type(bn) is not BatchNormAct2d or conv.bias is not None:
        return False
    if not _has_parts(bn, "act", "drop"):
        return False
    k, s = conv.kernel_size[0], conv.stride[0]
    dense = conv.groups == 1 and (k == s == 1 or is_image)
    depthwise = conv.groups == conv.in_channels == conv.out_channels and k == 3 and s in (1, 2)
    square = conv.kernel_size == (k, k) and conv.stride == (s, s)
    same_padding = conv.padding == (k // 2, k // 2) and k % 2 == 1 and conv.padding_mode == "zeros"
    plain_norm = (bn.affine and bn.track_running_stats and bn.momentum is not None
                  and type(bn.act) in BOUNDS and type(bn.drop) is nn.Identity)
    return ((dense or depthwise) and square and same_padding and conv.dilation == (1, 1)
            and plain_norm and conv.weight.dtype == bn.weight.dtype == torch.float32)


def slow_in_bf16(model: nn.Module) -> bool:
    """Whether CPUs train `model` faster in float32 than under bfloat16 autocast.

    That is so for grouped convolutions, except in fused blocks whose kernels know bfloat16.
    """
    if next(model.parameters()).device.type != "cpu":
        return False
    blocks = [module for module in model.modules() if type(module) in FUSED_BLOCKS.values() and has_bf16()]
    fused = {id(part) for block in blocks for part in block.modules()}
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 and id(module) not in fused
               for module in model.modules())
