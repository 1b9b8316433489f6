"""Each --amp computes in the precision that it names, and a whole run ends well in it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from kd import models
from kd.machine import runtime
from tests.gpu import DEVICE, REHEARSAL
from tests.gpu.watch import around_steps, losses_of

pytestmark = pytest.mark.cuda
no_fp16 = pytest.mark.skipif(REHEARSAL, reason="a CPU has no fp16")


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def test_amp_off_multiplies_in_float32():
    """TF32, which keeps 10 bits of each factor, would be 3e-4 off."""
    assert runtime.start(DEVICE.type, "off", "off").amp is None
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator).to(DEVICE) for _ in range(2))
    assert relative_error(a @ b, a.double() @ b.double()) < 1e-6

    x, weight = torch.randn(8, 64, 28, 28, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    exact = F.conv2d(x.double(), weight.double(), padding=1).to(DEVICE)
    for layout in (torch.contiguous_format, torch.channels_last):
        result = F.conv2d(x.to(DEVICE, memory_format=layout), weight.to(DEVICE, memory_format=layout), padding=1)
        # cuDNN may take Winograd's algorithm, which is some bits less exact than a plain sum
        assert relative_error(result, exact) < 1e-5


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), pytest.param("fp16", torch.float16, marks=no_fp16)])
def test_autocast_multiplies_in_half_precision_and_keeps_float32_weights(amp, dtype):
    machine = runtime.start(DEVICE.type, amp, "off")
    layer = torch.nn.Linear(64, 64, device=DEVICE)
    with machine.autocast():
        y = layer(torch.randn(8, 64, device=DEVICE))
    assert machine.amp is y.dtype is dtype and layer.weight.dtype is torch.float32


@pytest.mark.parametrize("amp", ["auto", "off", "bf16", pytest.param("fp16", marks=no_fp16)])
def test_a_whole_run(tiny, amp):
    result = train.main(dataclasses.replace(tiny, amp=amp, augment="crop", views=0, control=True, epochs=3))
    for role in ("teacher", "control", "student"):
        assert result[role]["test_total"] == 12 and 0 <= result[role]["test_correct"] <= 12
        saved = models.open_saved(str(Path(tiny.out) / role), runtime.start("cpu", "off", "off"))
        assert saved.model(torch.zeros(1, 3, saved.size, saved.size)).isfinite().all() and len(saved.classes) == 3
    entries = [json.loads(line) for line in (Path(tiny.out) / "metrics.jsonl").read_text().splitlines()]
    assert len(entries) == 1 + 3 + 3
    for entry in entries:
        assert math.isfinite(entry["train_loss"]) and math.isfinite(entry["loss"]) and entry["images_per_second"] > 0
    # views are fresh in each epoch, so the teacher is asked for each batch of the student's
    assert result["teacher_batches"] == 3 * 5


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=no_fp16)])
def test_half_precision_trains_as_float32_does(tiny, tmp_path, monkeypatch, amp):
    config = dataclasses.replace(tiny, teacher_epochs=0, lr=1e-4, epochs=1)
    exact = losses_of(monkeypatch, dataclasses.replace(config, out=str(tmp_path / "off")))
    half = losses_of(monkeypatch, dataclasses.replace(config, amp=amp, out=str(tmp_path / amp)))
    assert len(exact) == len(half) == 5
    assert half == pytest.approx(exact, rel=0.05)


@no_fp16
def test_an_fp16_gradient_that_overflows_skips_its_step_and_lowers_the_scale(tiny, monkeypatch):
    """The first scale is so large that some steps overflow; each halves it."""
    scaler_class, steps = torch.amp.GradScaler, []
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device, enabled=True: scaler_class(device, init_scale=2.0 ** 24, enabled=enabled))

    def around(step, arguments):
        model, scaler = arguments[0], arguments[2]
        before, scale = next(model.parameters()).detach().clone(), scaler.get_scale()
        loss, norm = step()
        steps.append((scale, scaler.get_scale(), not torch.equal(before, next(model.parameters())), loss.item()))
        return loss, norm

    around_steps(monkeypatch, around)
    result = train.main(dataclasses.replace(tiny, teacher_epochs=0, amp="fp16", epochs=4))
    assert all(math.isfinite(loss) for *_, loss in steps) and len(steps) == 4 * 5
    skipped = [after < before for before, after, *_ in steps]
    assert 0 < sum(skipped) < 20 and skipped[0]
    assert [not moved for *_, moved, _ in steps] == skipped
    assert all(after == before / 2 for before, after, *_ in steps if after < before)
    entries = [json.loads(line) for line in (Path(tiny.out) / "metrics.jsonl").read_text().splitlines()]
    assert entries[-1]["skipped"] == sum(skipped) and result["student"]["test_total"] == 12
