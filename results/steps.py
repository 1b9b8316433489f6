"""How fast the loop is with each method of the comparison, and how much is kept of a view.

    python -m results.steps --data FOLDER --cache-dir FOLDER

By turns in one process, on a machine that does nothing else, for some minutes. It writes results/methods/steps.json.
The student, its size and the flags are those of the comparison. The teacher's answers are stored already. The control
is timed twice, to show what is chance.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import train
from kd import cli
from kd.bench.compare import Turns
from kd.bench.loop import Bench
from kd.fast import blocks
from kd.machine import runtime
from kd.machine.files import write_atomic
from results.methods import CONTROL, METHODS, SHARED, STEPS

STEPS_A_ROUND = 8       # of each method


def timed(flags: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """By the name of the flags: milliseconds of a step, times those of "control", and bytes of a view."""
    with tempfile.TemporaryDirectory() as folder:
        benches = {name: Bench(cli.parse_config(train.Config, train.RECIPES, own, __doc__ or ""), STEPS_A_ROUND,
                               Path(folder) / name) for name, own in flags.items()}
        turns = Turns({name: partial(bench.fit, bench.student) for name, bench in benches.items()}, rounds)
    machine = next(iter(benches.values())).machine
    found = {}
    for name, bench in benches.items():
        times, interval = turns.ratio("control", name)      # of images a second, so the control's are above
        found[name] = {"milliseconds": 1000 * bench.cfg.batch_size / turns.median(name), "times": times,
                       "times_95": interval, "bytes": 4 * bench.warm.classes if bench.cfg.kd_weight else 0}
    return {"methods": found, "rounds": rounds, "steps_a_round": STEPS_A_ROUND,
            "machine": f"{machine.line}, {blocks.instructions()}", "environment": runtime.environment()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Caltech-101")
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    # Neither a model's weights nor the value of the tuned setting decide how long a step takes.
    shared = [*SHARED["caltech101"], "--teacher-weights", "none", "--dataset", args.data, "--cache-dir", args.cache_dir]
    flags = {"control": [*shared, *CONTROL], "control again": [*shared, *CONTROL]}
    for name, (own, setting, values) in METHODS.items():
        flags[name] = [*shared, *own, setting, values[0]]
    STEPS.parent.mkdir(exist_ok=True)
    write_atomic(STEPS, (json.dumps(timed(flags, args.rounds), indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
