"""One thread ahead: the next batch is made while the GPU works on this one."""

import queue
import threading
from typing import Generator, Iterator, TypeVar

import torch

T = TypeVar("T")


def prefetch(items: Iterator[T], device: torch.device, ahead: int = 2) -> Generator[T, None, None]:
    """Yield `items` in their order. One thread makes up to `ahead` of them early.

    An exception in the thread is raised here, in its turn. The thread ends when the consumer leaves early.
    On the CPU nothing is made ahead: the step already uses every core, and a second thread would only compete with it.
    """
    if device.type == "cpu":
        yield from items
        return
    ready: queue.Queue = queue.Queue(ahead)
    consumer_left = threading.Event()

    def work() -> None:
        try:
            for item in items:
                if not offer((item, None)):
                    return
            offer((None, StopIteration()))
        except BaseException as error:  # handed over, not handled: the consumer raises it
            offer((None, error))

    def offer(entry: tuple) -> bool:
        while not consumer_left.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        consumer_left.set()
        thread.join()
