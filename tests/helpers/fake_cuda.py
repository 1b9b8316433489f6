"""A GPU that is not there: tensors with a device and a shape but no numbers, and a log of what the host asks of it."""

import contextlib
import warnings
from typing import Any, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)


class Log(TorchDispatchMode):
    """What was asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []      # each is a kernel launch, but for views such as `aten.select.int`
        self.blocking = 0                   # copies to or from the device for which the host waits
        self.reads = 0                      # of a value by the host, which waits for all that was queued

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operators.append(str(func))
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            self.blocking += not kwargs.get("non_blocking", False)
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """Within, tensors on CUDA are fake, as if a GPU were there. Pinned memory is ordinary memory."""
    from kd import views

    def host_array(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        with unset_fake_temporarily():      # it is filled with real pictures
            return torch.empty(shape, dtype=torch.uint8)

    monkeypatch.setattr(views, "host_array", host_array)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Log() as log:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")   # by torch, in numpy()
        yield log
