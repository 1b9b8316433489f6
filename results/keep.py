"""What is kept of a run: a line of results/FAMILY/runs.jsonl, where its experiment is called FAMILY/ARM.

    python -m results.keep runs/FAMILY/ARM/seed-N ... >> results/FAMILY/runs.jsonl

A run keeps megabytes where there are 101 classes. Its line has its result, the settings that
decide it, the true classes, and for each role which pictures of validation and test it had right: a bit a picture, in
hexadecimal, in the order of the data set.
"""

import hashlib
import json
import sys
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from kd.data.frames import decode
from kd.data.table import open_dataset
from kd.machine import runtime
from kd.models import open_saved
from kd.predict import predict
from kd.tools import report
from kd.tools.predictions import FILE, read_predictions

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]
Right = dict[str, np.ndarray]   # by role: whether each picture was right, bool (N,)


def read_lines(path: Path) -> list[Record]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@cache
def read_runs(name: str) -> dict[int, Record]:
    """The kept runs of an experiment FAMILY/ARM by their seed; of two of a seed the later one."""
    family, arm = name.split("/")
    return {line["seed"]: line for line in read_lines(HERE / family / "runs.jsonl") if line["arm"] == arm}


def record_of(run: Path) -> Record:
    """The line of a run. Raises BadInput where it has not ended."""
    result, tested = report.read_result(run), read_predictions(run / FILE)
    config = result["config"]
    names, labels, right = validate(run, config, list(tested.logits))
    pictures = {"validation": (names, labels, right),
                "test": (tested.names, tested.labels, {role: tested.correct(role) for role in tested.logits})}
    result.update(labels={}, right={role: {} for role in tested.logits})
    for split, (names, labels, right) in pictures.items():
        order = in_order(names)
        # Most pictures of a class follow each other: pairs of a class and how many.
        result["labels"][split] = [[label, len(list(same))] for label, same in groupby(labels[order].tolist())]
        for role in tested.logits:
            result["right"][role][split] = np.packbits(right[role][order]).tobytes().hex()

    for key in ("dataset", "teacher_weights", "student_weights"):
        config[key] = Path(config[key]).name                # not where it lay on one machine
    weights = (run / "teacher" / "model.safetensors").read_bytes()
    result.update(config=report.deciding(config), teacher_sha256=hashlib.sha256(weights).hexdigest())
    return {"arm": run.parent.name, "seed": config["seed"], **result}


def validate(run: Path, config: dict[str, Any], roles: Sequence[str]) -> tuple[list[str], np.ndarray, Right]:
    """Of the validation pictures: their names, true classes, and by role which were right.

    A run keeps its predictions on test only, so the saved models are asked again.
    """
    machine = runtime.start(config["device"], config["amp"], "off")
    right: Right = {}
    for role in roles:
        classifier = open_saved(str(run / role), machine)
        prep, size = classifier.prep, classifier.size
        table = open_dataset(config["dataset"], **{key: config[key] for key in ("config", "image", "label")})
        split = decode(table, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                       cache_dir=config["cache_dir"])["validation"]
        right[role] = predict(classifier, split, role).argmax(axis=1) == split.labels
    return [split.name_of(row) for row in range(len(split.labels))], split.labels, right


def in_order(names: Sequence[str]) -> np.ndarray:
    """`(N,)` int64, the rows of a split in the order of the data set.

    A data set that an experiment has written names each picture by its place in the split.
    """
    places = [Path(name).stem for name in names]
    if all(map(str.isdigit, places)) and len(set(places)) == len(places):
        return np.argsort([int(place) for place in places])
    return np.arange(len(places))


def labels_and_right(record: Record, role: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The true class of each picture of a split, and whether a role had it right; `(N,)` int64 each."""
    labels = np.repeat(*np.transpose(record["labels"][split]))
    bits = np.frombuffer(bytes.fromhex(record["right"][role][split]), np.uint8)
    return labels, np.unpackbits(bits, count=len(labels)).astype(np.int64)


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        print(json.dumps(record_of(run)))
