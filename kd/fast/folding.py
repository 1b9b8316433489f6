"""Inference in fewer passes over the activations, for a model that is frozen.

In eval mode BatchNorm is a line for each channel, y·γ/σ + (β − μγ/σ), and a convolution before it is linear too. So
both together are one convolution with other weights and a bias (Jacob et al. 2018, section 3.2). On a CPU, oneDNN can
also apply the activation behind a convolution before it writes the result. Each of the two spares reading and writing
every activation once more.
"""

import copy
from typing import Any, Callable, cast

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Of the largest logit. TF32 rounds by less. A convolution that normalises its own weights differs by more.
TOLERANCE = 1e-2

# what oneDNN calls an activation, and its bounds
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0]), nn.SiLU: ("swish", []), nn.Hardswish: ("hardswish", [])}


@torch.no_grad()
def for_inference(model: nn.Module, size: int) -> tuple[nn.Module, str]:
    """A faster copy of `model`, which is in eval mode, and what was done to it: "folded", "fused", both or "".

    size: side of the square input, in pixels. Whatever gives other logits for a test picture is not done, as where
    convolutions normalise their own weights. Where nothing is done, `model` itself comes back.
    """
    parameter = next(model.parameters())
    ramp = torch.linspace(-2, 2, 2 * 3 * size * size, device=parameter.device, dtype=parameter.dtype)
    picture = ramp.view(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    logits = model(picture)
    done = []
    for name, step in (("folded", fold_batchnorm), ("fused", fuse_activations)):
        changed = step(model, picture)
        if changed is not model and (changed(picture) - logits).abs().max() <= TOLERANCE * logits.abs().max():
            model = changed
            done.append(name)
    return model, ", ".join(done)


def fold_batchnorm(model: nn.Module, picture: Tensor) -> nn.Module:
    """A copy with every BatchNorm folded that directly follows a convolution; `model` itself where there is none."""
    pairs = _follow(model, picture, lambda module: isinstance(module, _BatchNorm) and module.track_running_stats)
    folded = copy.deepcopy(model) if pairs else model
    for conv_name, norm_name in pairs:
        conv, norm = (cast(Any, folded.get_submodule(name)) for name in (conv_name, norm_name))
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var,
                                                      norm.eps, norm.weight, norm.bias)
        # timm's BatchNormAct2d applies the activation as well
        folded.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    return folded


def fuse_activations(model: nn.Module, picture: Tensor) -> nn.Module:
    """A copy whose convolutions apply the activation that directly follows them; `model` itself where there is none."""
    # torch.compile makes this call too. It is private, so another version of torch may lack it.
    if picture.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return model
    pairs = [(conv, act) for conv, act in _follow(model, picture, lambda module: type(module) in ACTIVATIONS)
             if _is_plain(model.get_submodule(conv))]
    fused = copy.deepcopy(model) if pairs else model
    for conv_name, act_name in pairs:
        conv, act = (cast(Any, fused.get_submodule(name)) for name in (conv_name, act_name))
        fused.set_submodule(conv_name, ConvAct(conv, act))
        fused.set_submodule(act_name, nn.Identity())
    return fused


def _is_plain(conv: Any) -> bool:
    """Whether its weights are used as they are, on zeros around the picture."""
    return type(conv) in (nn.Conv2d, Conv2dSame) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class ConvAct(nn.Module):
    """A convolution with its activation, as one call of oneDNN."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = conv, act
        self.weights: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}      # by precision: weight and bias

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)`, in autocast's precision where that is on."""
        conv = self.conv
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else conv.weight.dtype
        in_hardware = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if dtype != torch.float32 and not in_hardware:
            return self.act(conv(x))
        padding = conv.padding
        if isinstance(conv, Conv2dSame):
            x, padding = pad_same(x, [*conv.kernel_size], [*conv.stride], [*conv.dilation]), (0, 0)
        if dtype not in self.weights:
            self.weights[dtype] = conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
        return torch.ops.mkldnn._convolution_pointwise(x.to(dtype), *self.weights[dtype], padding, conv.stride,
                                                       conv.dilation, conv.groups, *ACTIVATIONS[type(self.act)], "")


def _follow(model: nn.Module, picture: Tensor, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, str]]:
    """The names of each convolution and of the wanted module that takes its very output on the way of `picture`."""
    outputs: list[tuple[Tensor, int, nn.Module]] = []   # the tensors are held, so that no two have the same address
    inputs: list[tuple[Tensor, int, nn.Module]] = []
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, y: outputs.append((y, y._version, conv))))
        elif wanted(module):
            hooks.append(module.register_forward_pre_hook(
                lambda follower, x: inputs.append((x[0], x[0]._version, follower))))
    model(picture)
    for hook in hooks:
        hook.remove()

    names = {module: name for name, module in model.named_modules()}
    # The version tells where something was added to the output in place, as blocks with a residual do.
    makers = {(id(y), version): conv for y, version, conv in outputs}
    # A module that is called several times may follow another one each time.
    calls = [module for _, _, module in outputs + inputs]
    pairs = [(makers.get((id(x), version)), follower) for x, version, follower in inputs]
    return [(names[conv], names[follower]) for conv, follower in pairs
            if conv is not None and calls.count(conv) == calls.count(follower) == 1]
