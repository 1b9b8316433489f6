"""BatchNorm folded into the convolution before it, for a model that only answers.

In eval mode BatchNorm is a line for each channel, y·γ/σ + (β − μγ/σ), and a convolution before it is linear too. So
both together are one convolution with other weights and a bias (Jacob et al. 2018, section 3.2). That spares reading
and writing every activation once more.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Of the largest logit. TF32 rounds by less. A convolution that normalises its own weights differs by more.
TOLERANCE = 1e-2


@torch.no_grad()
def fold_batchnorm(model: nn.Module, size: int) -> nn.Module:
    """A copy of `model`, which is in eval mode, with every BatchNorm folded that directly follows a convolution.

    size: side of the square input, in pixels. Returns `model` itself where nothing can be folded, or where the copy
    gives other logits for a test picture, as with convolutions that normalise their own weights.
    """
    parameter = next(model.parameters())
    ramp = torch.linspace(-2, 2, 2 * 3 * size * size, device=parameter.device, dtype=parameter.dtype)
    picture = ramp.view(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    before, pairs = _trace(model, picture)
    if not pairs:
        return model

    folded = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    for pair in pairs:
        conv, norm = (cast(Any, folded.get_submodule(names[module])) for module in pair)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var,
                                                      norm.eps, norm.weight, norm.bias)
        # timm's BatchNormAct2d applies the activation as well
        folded.set_submodule(names[pair[1]], getattr(norm, "act", nn.Identity()))
    same = (folded(picture) - before).abs().max() <= TOLERANCE * before.abs().max()
    return folded if same else model


def _trace(model: nn.Module, picture: Tensor) -> tuple[Tensor, list[tuple[nn.Module, nn.Module]]]:
    """The logits of `picture`, and each convolution with the BatchNorm that took its very output on the way."""
    outputs: list[tuple[Tensor, nn.Module]] = []        # held, so that no two have the same address
    inputs: list[tuple[Tensor, nn.Module]] = []
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, y: outputs.append((y, conv))))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(lambda norm, x: inputs.append((x[0], norm))))
    logits = model(picture)
    for hook in hooks:
        hook.remove()

    makers = {id(y): conv for y, conv in outputs}
    pairs = [(makers[id(x)], norm) for x, norm in inputs if id(x) in makers]
    # A module that is called several times may follow another one each time.
    calls = [module for _, module in outputs + inputs]
    return logits, [pair for pair in pairs if all(calls.count(module) == 1 for module in pair)]
