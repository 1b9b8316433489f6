"""One thread ahead: the next batch is made while the GPU works on this one."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generator, Iterator, TypeVar

import torch

T = TypeVar("T")


def prefetch(items: Iterator[T], device: torch.device, ahead: int = 2) -> Generator[T, None, None]:
    """Yield `items` in their order. One thread makes `ahead` of them early.

    An exception in the thread is raised here, in its turn. The thread ends when the consumer leaves early.
    On the CPU nothing is made ahead: the step already uses every core, and a second thread would only compete with it.
    """
    if device.type == "cpu":
        yield from items
        return
    end: Any = object()
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
