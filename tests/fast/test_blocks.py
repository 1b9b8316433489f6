"""The fused training step against timm's own modules: outputs, gradients, running statistics, names, determinism."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from kd.fast import blocks

NAMES = ["mobilenetv2_035", "mobilenetv2_050"]  # channel counts that are no multiple of 16 among them
pytestmark = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512",
                                reason="the fused kernels need a CPU with AVX-512")


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
@pytest.mark.parametrize("shape", [(5, 3, 64, 64), (2, 3, 33, 47), (8, 3, 32, 32)])
def test_a_training_step_is_the_plain_one_within_rounding(name, shape):
    exact, plain, fused = models(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (a, ga, ba), (b, gb, bb), (c, gc, bc) = (step(model, x) for model in (exact, plain, fused))
    # Float32 rounding is amplified by normalisation over few pixels, and where it moves a value across a kink of
    # ReLU6 the gradient jumps, so errors are heavy-tailed: the plain model's own error is the yardstick, not its bound
    assert (c - a).norm() <= 10 * (b - a).norm() + 1e-6 * a.norm()
    assert (gc - ga).norm() <= 10 * (gb - ga).norm() + 1e-6 * ga.norm()
    for key, value in ba.items():
        assert torch.allclose(bc[key], value, rtol=1e-4, atol=3 * (bb[key] - value).abs().max().item() + 1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_the_step_is_no_less_exact_than_the_plain_modules_in_bf16(name):
    exact, plain, fused = models(name)
    x = torch.randn((8, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    a, ga, ba = step(exact, x)
    with torch.autocast("cpu", torch.bfloat16):
        (b, gb, bb), (c, gc, bc) = step(plain, x), step(fused, x)
    assert (c - a).norm() <= 1.5 * (b - a).norm() and (gc - ga).norm() <= 1.5 * (gb - ga).norm()
    assert (c - a).norm() > (step(fused, x)[0] - a).norm()  # it did run in bf16
    for key, value in ba.items():
        assert torch.allclose(bc[key], value, rtol=2e-2, atol=2 * (bb[key] - value).abs().max().item() + 1e-3), key


@pytest.mark.parametrize("name, slow", [("mobilenetv2_050", False), ("test_resnet", False),
                                        ("efficientnet_lite0", True)])
def test_plain_grouped_convolutions_are_slow_in_bf16(name, slow):
    model = timm.create_model(name, num_classes=3)
    assert blocks.slow_in_bf16(blocks.accelerate(model)) == slow


def test_weights_keep_their_names_and_evaluation_is_untouched():
    _, plain, fused = models("mobilenetv2_050")
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    x = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert torch.equal(fused.eval()(x), plain.eval()(x))


def test_the_same_step_gives_the_same_bits():
    _, _, fused = models("mobilenetv2_050")
    start, x = copy.deepcopy(fused.state_dict()), torch.randn(4, 3, 64, 64)
    first = step(fused, x)
    for _ in range(3):
        fused.load_state_dict(start)
        again = step(fused, x)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_model_of_other_pieces_is_left_alone():
    model = timm.create_model("test_resnet", num_classes=3)
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in blocks.accelerate(model).modules()] == before
