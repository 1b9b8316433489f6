"""The compiled teacher is the teacher."""

import pytest
import timm
import torch

from kd import models
from kd.fast import compiled_teacher


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    for module in model.modules():  # statistics and scales as a trained model has them, so that folding is no identity
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return models.freeze(model.to(memory_format=torch.channels_last))


def test_every_batch_size_gives_the_plain_models_logits(teacher):
    before = models.digest(teacher)
    ask = compiled_teacher.compile_frozen(teacher, 8, compile=True)
    x = torch.randn(17, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = teacher(x)
        for count in (8, 1, 5, 9, 17):
            logits = ask(x[:count])
            assert logits.shape == (count, 3)
            assert (logits - plain[:count]).abs().max() <= 1e-4 * plain.abs().max()
        assert torch.equal(ask(x[:8]), ask(x[:8]))
        with torch.autocast("cpu", torch.bfloat16):  # as the teacher is asked where the CPU multiplies bf16
            assert (ask(x[:8]) - plain[:8]).abs().max() <= 2e-2 * plain.abs().max()
    assert models.digest(teacher) == before


def test_without_a_compiler_the_model_itself_answers(teacher, monkeypatch, capsys):
    def broken(*_, **__):
        def call(x):
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)
        return call

    monkeypatch.setattr(torch, "compile", broken)
    ask = compiled_teacher.compile_frozen(teacher, 4, compile=True)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ask(x), teacher(x), atol=1e-5) and torch.allclose(ask(x), teacher(x), atol=1e-5)
    assert capsys.readouterr().err.count("teacher: not compiled") == 1
    assert compiled_teacher.compile_frozen(teacher, 4, compile=False) is teacher


def test_work_is_counted_as_two_for_a_multiply_add():
    model = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False).eval()
    assert compiled_teacher.work(model, images=10, size=8) == 10 * 2 * 8 * 8 * 4 * 27
