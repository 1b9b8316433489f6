"""Tests marked `cuda` are skipped where there is no GPU."""

import os

import pytest
import torch

# cuBLAS computes the same bits every time only with a workspace of a fixed size, which it reads when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from tests.gpu import REHEARSAL  # noqa: E402


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not (torch.cuda.is_available() or REHEARSAL):
        pytest.skip("torch.cuda.is_available() is False: there is no GPU here")


@pytest.fixture(autouse=True)
def settings_restored():
    """Each test leaves torch's settings, which are the process's, as it found them."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


@pytest.fixture
def tiny(tiny):
    """The tiny run, on the GPU and uncompiled."""
    import dataclasses

    from tests.gpu import DEVICE
    return dataclasses.replace(tiny, device=DEVICE.type, compile="off")
