"""The Triton loss against float64: as exact as the reference in float32."""

import pytest
import torch

from kd.fast import fused_loss
from kd.fast.fused_loss import fused_kd_loss
from kd import NO_LABEL
from tests.gpu import DEVICE, REHEARSAL
from train import kd_loss
from tests.helpers.loss_cases import DTYPES, assert_no_worse, logits, loss_and_gradient

pytestmark = pytest.mark.cuda


def on_device(*tensors):
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def test_triton_computes_the_loss():
    assert fused_loss.load_kernel(DEVICE.type) == ("C++" if REHEARSAL else "Triton", "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 2, 3, 1000, 8192, 9001])      # a row of 9001 is read in blocks
def test_loss_and_gradient(C, dtype):
    s, t, labels = on_device(*logits(41, C, dtype=dtype))
    labels[::5] = NO_LABEL
    # The CPU's kernel rounds what a gradient in fp16 is scaled by to fp16, where 0.75 is exact.
    upstream = 0.75 if REHEARSAL else 0.7
    for T in (0.5, 5.0):
        for weight in (0.0, 0.5, 1.0):
            result = loss_and_gradient(fused_kd_loss, s, t, labels, T, weight, upstream=upstream)
            assert_no_worse(result, s, t, labels, T, weight, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [2, 3, 1000, 8192, 9001])
@pytest.mark.parametrize("kind", ["masked", "student masked", "huge", "close"])
def test_logits_of_minus_infinity_and_other_hard_rows(kind, C, dtype):
    s, t, labels = on_device(*logits(5, C, kind, dtype))
    for weight in (0.0, 0.5, 1.0):
        result = loss_and_gradient(fused_kd_loss, s, t, labels, 5.0, weight)
        assert_no_worse(result, s, t, labels, 5.0, weight)


def test_rows_of_nothing_but_minus_infinity_are_nan_as_in_the_reference_and_only_they():
    s, t, labels = on_device(*logits(4, 1000))
    s[1] = t[1] = float("-inf")
    for weight in (0.5, 1.0):
        loss, gradient = loss_and_gradient(fused_kd_loss, s, t, labels, 5.0, weight)
        expected, expected_gradient = loss_and_gradient(kd_loss, s, t, labels, 5.0, weight)
        assert loss.isnan() and expected.isnan()
        assert gradient[1].isnan().all() and expected_gradient[1].isnan().all()
        others = [0, 2, 3]
        assert torch.allclose(gradient[others], expected_gradient[others], rtol=1e-4, atol=1e-8)


def test_a_batch_without_any_label_has_the_gradient_of_the_kl_alone():
    s, t, labels = on_device(*logits(8, 1000))
    labels[:] = NO_LABEL
    result = loss_and_gradient(fused_kd_loss, s, t, labels, 5.0, 0.5)
    assert_no_worse(result, s, t, labels, 5.0, 0.5)
    only_kl = loss_and_gradient(fused_kd_loss, s, t, labels, 5.0, 1.0)
    assert torch.allclose(result[1], only_kl[1] / 2, rtol=1e-5, atol=0) and result[1].abs().max() > 0
