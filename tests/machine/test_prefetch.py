"""One batch ahead: order, errors and threads."""

import threading
import time

import pytest
import torch

from kd.machine.prefetch import prefetch


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta stands for a device that has a thread working ahead
def test_prefetch_keeps_the_order_and_passes_errors_on(device):
    def items():
        yield from range(5)
        raise KeyError("made too late")

    got = []
    with pytest.raises(KeyError, match="made too late"):
        for item in prefetch(items(), torch.device(device)):
            got.append(item)
    assert got == [0, 1, 2, 3, 4]


def test_a_consumer_that_leaves_early_leaves_no_thread():
    def endless():
        while True:
            yield 0

    before = threading.active_count()
    made = prefetch(endless(), torch.device("meta"))
    assert next(made) == 0
    made.close()
    assert threading.active_count() == before


def test_prefetch_works_ahead_of_its_consumer():
    made = []

    def items():
        for i in range(3):
            made.append(i)
            yield i

    stream = prefetch(items(), torch.device("meta"))
    next(stream)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]
    stream.close()
