"""`python -m tests.stress.scale`: 100,000 pictures of 1000 classes through the real code, from files to a student.

Prints, as JSON, the peak of the resident memory, the rate of the last tenth of each epoch's steps over that of its
first tenth, and how often the teacher was asked for a sample. Exits with 1 where one of them is not as it should be.

An epoch takes a minute, over which a machine may become half as fast again. So every five steps a step that is always
the same, of a model of its own, is timed in between: the rates that are compared are counted in such steps.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import train
from kd import models
from kd.batches import Batch
from kd.teacher import Teacher

GIB = 1 << 30
SIDE = 36


def write_class(root: Path, counts: dict[str, int], number: int) -> None:
    """The pictures of one class: its own coarse pattern, under noise."""
    generator = np.random.default_rng(number)
    pattern = generator.integers(40, 216, (4, 4, 3))
    for split, count in counts.items():
        folder = root / split / f"{number:04d}"
        folder.mkdir(parents=True)
        for i in range(count):
            coarse = np.clip(pattern + generator.normal(0, 30, pattern.shape), 0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(folder / f"{i}.jpg")


def resident(field: str) -> int:
    """Bytes: `VmRSS`, now, or `VmHWM`, at the most since the process began."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def first_over_last(seconds: np.ndarray) -> float:
    """The median of the first tenth over that of the last: the rate of the last over that of the first."""
    tenth = max(len(seconds) // 10, 1)
    return float(np.median(seconds[:tenth]) / np.median(seconds[-tenth:]))


def watched(config: train.Config) -> dict[str, Any]:
    """Run `config`; the seconds of every step (all that lies between two), and of the one that is always the same; the
    memory, and the samples that the teacher was asked for."""
    times: list[float] = []
    machine: list[float] = []
    memory: list[int] = []
    asked: list[np.ndarray] = []
    step, answer = train.train_step, Teacher.outputs
    same = models.create("student", config.student, ("a", "b")).to(memory_format=torch.channels_last)
    pixels = torch.zeros(config.batch_size, 3, config.size, config.size).to(memory_format=torch.channels_last)
    since = time.perf_counter()

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal since
        result = step(*args, **kwargs)
        times.append(time.perf_counter() - since)
        if len(times) % 5 == 1:
            memory.append(resident("VmRSS"))
            start = time.perf_counter()
            same(pixels).sum().backward()
            machine.append(time.perf_counter() - start)
        since = time.perf_counter()
        return result

    def counted(teacher: Teacher, batch: Batch) -> torch.Tensor:
        before = teacher.store.teacher_batches
        outputs = answer(teacher, batch)
        if teacher.store.teacher_batches > before:
            asked.append(batch.samples)
        return outputs

    train.train_step = timed
    Teacher.outputs = counted  # type: ignore[assignment, method-assign]
    try:
        result = train.main(config)
    finally:
        train.train_step = step
        Teacher.outputs = answer  # type: ignore[assignment, method-assign]
    return {"result": result, "times": times, "machine": machine, "memory": memory, "asked": np.concatenate(asked)}


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args(argv)
    each = args.samples // args.classes
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with ProcessPoolExecutor(2) as pool:
            write = partial(write_class, root / "data", {"train": each, "validation": 1, "test": 1})
            list(pool.map(write, range(args.classes), chunksize=10))
        found = watched(train.Config(
            dataset=str(root / "data"), size=32, epochs=2, batch_size=64, lr=1e-3, teacher="resnet10t",
            teacher_weights="none", teacher_epochs=0, allow_weak_teacher=True, student="mobilenetv2_050",
            augment="crop", out=str(root / "run"), cache_dir=str(root / "cache"), device="cpu"))
        ratios, of_machine = ([first_over_last(epoch) for epoch in np.array_split(found[key], 2)]
                              for key in ("times", "machine"))
        once = np.array_equal(np.sort(found["asked"]), np.arange(each * args.classes))
        report = {"samples": each * args.classes, "classes": args.classes,
                  "peak_gib": resident("VmHWM") / GIB,
                  "gib_over_time": [round(found["memory"][i] / GIB, 3) for i in
                                    np.linspace(0, len(found["memory"]) - 1, 10).astype(int)],
                  "last_tenth_over_first": [loop / same for loop, same in zip(ratios, of_machine)],
                  "uncorrected": ratios, "each_sample_asked_once": bool(once),
                  "images_per_second": [entry["images_per_second"] for entry in map(
                      json.loads, (root / "run" / "metrics.jsonl").read_text().splitlines())],
                  "cache_mb": sum(path.stat().st_size for path in (root / "cache").rglob("*") if path.is_file()) / 1e6}
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    made = main(sys.argv[1:])
    sys.exit(not (made["peak_gib"] < 2 and min(made["last_tenth_over_first"]) >= 0.95
                  and made["each_sample_asked_once"]))
