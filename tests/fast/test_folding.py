"""A model in fewer passes gives the same logits, and one that cannot be changed stays as it is."""

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from kd.fast.folding import ACTIVATIONS, ConvAct, for_inference, fuse_activations


def trained(name: str) -> nn.Module:
    """A model whose running statistics are those of pictures."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# with BatchNorm, BatchNormAct2d, Conv2dSame, grouped convolutions, squeeze and excitation, and each known activation
@pytest.mark.parametrize("name, pairs", [
    ("test_resnet", 8), ("test_efficientnet", 11), ("mobilenetv2_035", 35), ("tf_efficientnet_lite0", 33),
    ("mobilenetv3_small_050", 33), ("resnext26ts", 19), ("regnetx_002", 27)])
def test_all_norms_go_the_activations_follow_and_the_logits_stay(name, pairs):
    model = trained(name)
    count = norms(model)
    changed, done = for_inference(model, 64)
    assert done == "folded, fused" and norms(changed) == 0 and norms(model) == count > 0
    fused = [module for module in changed.modules() if isinstance(module, ConvAct)]
    assert len(fused) == pairs
    pictures = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(pictures)
        assert torch.allclose(changed(pictures), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("name", ["test_vit", "nf_resnet26"])
def test_without_foldable_norms_the_model_itself_comes_back(name):
    model = trained(name)
    assert for_inference(model, 160 if name == "test_vit" else 64) == (model, "")


class Shared(nn.Module):
    """One norm after two convolutions, and one convolution whose output is also used without its norm."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.shared = shared

    def forward(self, x):
        y = self.one(x)
        out = self.norm(y) + (self.norm(self.two(x)) if self.shared else y)
        return out.mean((2, 3))


@pytest.mark.parametrize("shared", [True, False])
def test_what_another_part_uses_as_well_is_not_folded(shared):
    torch.manual_seed(0)
    model = Shared(shared)
    model(torch.randn(8, 3, 8, 8) * 3)
    model.eval()
    assert for_inference(model, 8) == (model, "")


@pytest.mark.parametrize("act", list(ACTIVATIONS), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("conv", [nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.Conv2d(6, 6, 5, 2, (2, 0), groups=6),
                                  Conv2dSame(6, 4, 3, 2), nn.Conv2d(6, 4, 3, dilation=2)])
def test_a_fused_activation_is_the_plain_one(act, conv):
    torch.manual_seed(0)
    pictures = 4 * torch.randn(2, 6, 11, 9)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = pictures.contiguous(memory_format=layout)
        with torch.no_grad():
            torch.testing.assert_close(ConvAct(conv, act())(x), act()(conv(x)), rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                fused, plain = ConvAct(conv, act())(x), act()(conv(x))
            assert fused.dtype == plain.dtype == torch.bfloat16
            torch.testing.assert_close(fused, plain, rtol=2e-2, atol=5e-2)


class Residual(nn.Module):
    """The activation takes the convolution's output, but something was added to it in place before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        y += x
        return self.act(y).mean((2, 3))


def test_an_activation_behind_a_sum_in_place_is_left_alone():
    model = Residual()
    assert fuse_activations(model, torch.randn(1, 3, 4, 4)) is model


def test_another_version_of_torch_does_without(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert for_inference(trained("test_resnet"), 64)[1] == "folded"
