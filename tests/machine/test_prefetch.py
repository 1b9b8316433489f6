"""One batch ahead: order, errors and threads."""

import threading
import time

import pytest
import torch

from kd.machine.prefetch import prefetch

AHEAD = torch.device("meta")    # stands for a device that has a thread working ahead


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_prefetch_keeps_the_order_and_passes_errors_on(device):
    def items():
        yield from range(5)
        raise KeyError("made too late")

    got = []
    with pytest.raises(KeyError, match="made too late"):
        for item in prefetch(items(), torch.device(device)):
            got.append(item)
    assert got == [0, 1, 2, 3, 4]


def test_prefetch_works_two_ahead_and_leaves_no_thread_where_its_consumer_leaves_early():
    made: list[int] = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    stream = prefetch(endless(), AHEAD)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2] and threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before and made == [0, 1, 2]
