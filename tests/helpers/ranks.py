"""One rank of a run that is watched: `torchrun ... -m tests.helpers.ranks NOTES [--kill SIGNAL STEP] train.py's flags`.

Every rank leaves NOTES.RANK.json: the mean loss of each step, and the hash of each (epoch's view, sample) that it saw.
With --kill, rank 1 sends itself that signal before its STEP-th step, unless torchrun has started it again.
With --rank-1 FLAGS, rank 1 has these flags in addition.
"""

import hashlib
import json
import os
import shlex
import sys
from typing import Any

import numpy as np

import train
from kd import batches, cli
from kd.machine import distributed


def watch(notes: dict[str, Any], kill: tuple[int, int] = (0, -1)) -> Any:
    """Replace train_step and load_views by ones that write into `notes`; returns what undoes that."""
    step, load = train.train_step, batches.load_views
    notes.update(losses=[], views={})

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        if len(notes["losses"]) == kill[1]:
            os.kill(os.getpid(), kill[0])
        loss, norm = step(*args, **kwargs)
        notes["losses"].append(distributed.mean_over_ranks(loss).item())
        return loss, norm

    def watched_load(frames: Any, samples: np.ndarray, view: int, *rest: Any) -> Any:
        made = load(frames, samples, view, *rest)
        for sample, pixels in zip(samples.tolist(), made, strict=True):
            notes["views"][f"{view}/{sample}"] = hashlib.sha256(pixels.contiguous().numpy()).hexdigest()
        return made

    train.train_step = watched_step
    batches.load_views = watched_load  # type: ignore[assignment]

    def undo() -> None:
        train.train_step, batches.load_views = step, load
    return undo


if __name__ == "__main__":
    path, *flags = sys.argv[1:]
    kill = (0, -1)
    if flags[0] == "--kill":
        if cli.rank() == 1 and not distributed.restarted():
            kill = (int(flags[1]), int(flags[2]))
        flags = flags[3:]
    if flags[0] == "--rank-1":
        flags = flags[2:] + (shlex.split(flags[1]) if cli.rank() == 1 else [])
    notes: dict[str, Any] = {}
    watch(notes, kill)
    cli.run(train.main, cli.parse_config(train.Config, train.RECIPES, flags, ""))
    with open(f"{path}.{cli.rank()}.json", "w") as file:
        json.dump(notes, file)
