"""Device, precision and kernels, as the flags and the machine say."""

import pytest
import torch

from kd import BadInput
from kd.machine import runtime


def test_a_device_or_precision_that_is_not_there_is_refused(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cuda"):
            runtime.start("cuda", "auto", "auto")
    with pytest.raises(BadInput, match="--amp fp16"):
        runtime.start("cpu", "fp16", "auto")
    for fast, amp in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        assert runtime.start("cpu", "auto", "auto")[1:3] == (amp, False)
    assert runtime.start("cpu", "bf16", "on")[1:3] == (torch.bfloat16, True)


def test_the_switch_for_kernels_reaches_the_allocator(monkeypatch):
    tuned = []
    monkeypatch.setattr(runtime, "tune_allocator", lambda: tuned.append(True))
    assert not runtime.start("cpu", "off", "off", "off").kernels and tuned == []
    assert runtime.start("cpu", "off", "off", "auto").kernels and tuned == [True]
