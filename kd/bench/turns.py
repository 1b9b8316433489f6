"""Timing by turns: machines drift by a factor of two within minutes, so only ratios within a round are compared."""

import random
import sys
import time
from typing import Callable

import numpy as np
import torch

from kd.machine import devices
from kd.scores import bootstrap_interval

LEAST_ROUNDS = 5        # even where they take longer than their minutes


def now_on(device: torch.device) -> float:
    """The time in seconds, once the device has done all that was queued."""
    devices.wait(device)
    return time.perf_counter()


def note(line: str) -> None:
    """Standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


class Turns:
    """Images/s of several loops, each once a round, in an order that is shuffled from round to round."""

    def __init__(self, loops: dict[str, Callable[[], float]], rounds: int = 0, deadline: float = 0.0) -> None:
        """rounds: so many; 0: LEAST_ROUNDS, and as many more as end before `deadline`, a time of time.monotonic()."""
        self.names = list(loops)
        for name in loops:      # the first time compiles, allocates and fills stores: not counted
            note(f"warming up: {name}")
            loops[name]()

        rows: list[list[float]] = []
        order = random.Random(0)        # shuffled, so that none always follows the same other one
        longest = 0.0                   # seconds of a round
        while len(rows) < (rounds or LEAST_ROUNDS) or (not rounds and time.monotonic() + longest < deadline):
            begin = time.monotonic()
            rates = {name: loops[name]() for name in order.sample(self.names, len(self.names))}
            rows.append([rates[name] for name in self.names])
            longest = max(longest, time.monotonic() - begin)
            note(f"round {len(rows)}: {time.monotonic() - begin:.0f} s")
        self.rates = np.array(rows)     # (rounds, loops)

    def median(self, name: str) -> float:
        """Images/s."""
        return float(np.median(self.rates[:, self.names.index(name)]))

    def ratio(self, over: str, under: str) -> tuple[float, list[float]]:
        """The median of the ratios within rounds, in which drift between rounds cancels, and its 95 % interval."""
        ratios = self.rates[:, self.names.index(over)] / self.rates[:, self.names.index(under)]
        return float(np.median(ratios)), interval_of_median(ratios)


def interval_of_median(ratios: np.ndarray) -> list[float]:
    """The 95 % interval of the median of `(rounds,)`, by drawing rounds again."""
    order, rounds = np.argsort(ratios), len(ratios)

    def medians(counts: np.ndarray) -> np.ndarray:
        """counts: `(draws, rounds)`, how often a draw has each round. The middle one, or the mean of two."""
        ends = counts[:, order].cumsum(axis=1)
        middle = [ratios[order][(ends > rank).argmax(axis=1)] for rank in ((rounds - 1) // 2, rounds // 2)]
        return (middle[0] + middle[1]) / 2

    return bootstrap_interval(medians, rounds)
