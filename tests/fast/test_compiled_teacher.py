"""The compiled teacher is the teacher."""

import pytest
import torch
from torch import Tensor, nn

from kd import models
from kd.fast import compiled_teacher


class SmallResNet(nn.Module):
    """Two convolutions with BatchNorm, a residual and a classifier: few, because a compiler takes a second for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.block(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    model = SmallResNet()
    for module in model.modules():  # statistics and scales as a trained model has them, so that folding is no identity
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return models.freeze(model.to(memory_format=torch.channels_last))


def test_every_batch_size_gives_the_plain_models_logits(teacher):
    before = models.digest(teacher)
    compiled = compiled_teacher.compile_frozen(teacher, 8, compile=True)
    x = torch.randn(17, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = teacher(x)
        for count in (8, 1, 5, 9, 17):
            logits = compiled(x[:count])
            assert logits.shape == (count, 3)
            assert (logits - plain[:count]).abs().max() <= 1e-4 * plain.abs().max()
        assert torch.equal(compiled(x[:8]), compiled(x[:8]))
        with torch.autocast("cpu", torch.bfloat16):  # as the teacher is called where the CPU multiplies bf16
            assert (compiled(x[:8]) - plain[:8]).abs().max() <= 2e-2 * plain.abs().max()
    assert models.digest(teacher) == before


def test_without_a_compiler_the_model_itself_answers(teacher, monkeypatch, capsys):
    def broken(*_, **__):
        def call(x):
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)
        return call

    monkeypatch.setattr(torch, "compile", broken)
    compiled = compiled_teacher.compile_frozen(teacher, 4, compile=True)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(compiled(x), teacher(x), atol=1e-5)
        assert torch.allclose(compiled(x), teacher(x), atol=1e-5)
    assert capsys.readouterr().err.count("teacher: not compiled") == 1
    assert compiled_teacher.compile_frozen(teacher, 4, compile=False) is teacher


def test_a_multiply_add_counts_as_two_operations():
    model = nn.Conv2d(3, 4, 3, padding=1, bias=False).eval()
    assert compiled_teacher.count_operations(model, images=10, size=8) == 10 * 2 * 8 * 8 * 4 * 27


def test_auto_compiles_only_for_enough_work():
    model = nn.Conv2d(3, 4, 3, padding=1, bias=False).eval()  # 13,824 operations for an image of 8 × 8
    enough = int(compiled_teacher.WORTH_COMPILING / 13_824) + 1
    assert compiled_teacher.worth_compiling(model, enough, 8, "auto")
    assert not compiled_teacher.worth_compiling(model, enough - 1, 8, "auto")
    assert compiled_teacher.worth_compiling(model, 1, 8, "on")
    assert not compiled_teacher.worth_compiling(model, enough, 8, "off")
