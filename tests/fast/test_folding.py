"""A model with its BatchNorm folded gives the same logits, and one that cannot be folded stays as it is."""

import pytest
import timm
import torch
from torch import nn

from kd.fast.folding import fold_batchnorm


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


# with BatchNorm, BatchNormAct2d, Conv2dSame, grouped convolutions, and squeeze and excitation
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv2_035", "tf_efficientnet_lite0",
                                  "mobilenetv3_small_050", "resnext26ts", "regnetx_002"])
def test_all_norms_go_and_the_logits_stay(name):
    model = trained(name)
    count = norms(model)
    folded = fold_batchnorm(model, 64)
    pictures = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(folded(pictures), model(pictures), rtol=1e-3, atol=1e-4 * model(pictures).abs().max())
    assert norms(folded) == 0 and norms(model) == count > 0


@pytest.mark.parametrize("name", ["test_vit", "nf_resnet26"])
def test_without_foldable_norms_the_model_itself_comes_back(name):
    model = trained(name)
    assert fold_batchnorm(model, 160 if name == "test_vit" else 64) is model


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
    assert fold_batchnorm(model, 8) is model
