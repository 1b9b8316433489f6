"""Every experiment of results/README.md: the flags of train.py, the seeds, and the run that must have ended first.

    python -m results.experiments RUN ...

RUN is EXPERIMENT/seed-N or a pattern, such as 'few/beans-60-*' or 'folds/*/seed-0'. Each run is made in runs/RUN by the
command that is printed, one after another. A run that has ended is left alone, and one that was stopped goes on. So the
script may be started again at any time, and several times at once for other runs.

data/ holds the data sets and timm's ImageNet weights. It and runs/ may be links. FIRST in the flags stands for the run
that must have ended first.
"""

import fnmatch
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np

from kd import few_labels
from kd.data.table import Table, open_dataset
from kd.tools.predictions import FILE

DATA, OUT = Path("data"), Path("runs")
FOLDS = 5

TEACHER = "--teacher-weights data/tf_efficientnet_lite0.safetensors"
TAUGHT = "--teacher-weights FIRST/teacher --teacher-epochs 0"
PEER = "--teacher mobilenetv2_100 --teacher-size 0"     # the student's network, which sees the student's pictures
MOBILENET = "data/mobilenetv2_100.safetensors"
FEW = {"beans": "--recipe few --allow-weak-teacher --augment crop --teacher-augment crop --teacher-size 224 "
                "--epochs 20 --views 20",
       "caltech101": "--recipe few --allow-weak-teacher --size 64 --teacher-size 96 --epochs 60 --views 20"}

Pictures = dict[str, np.ndarray]    # by split: (N, 2) int64, the row in the table and the label of each picture


class Experiment(NamedTuple):
    """The runs behind a row of a table."""

    data: str                   # a data set, or what `pictures` makes of it: its name, - and more
    flags: str                  # of two equal ones the last one counts
    first: str = ""             # the run that must have ended first; {seed} is the same seed
    seeds: Sequence[int] = range(3)
    pictures: Callable[[Table, int], Pictures] | None = None    # of a data set and a seed


Named = Iterator[tuple[str, Experiment]]


# ---- data sets of their own --------------------------------------------------------------------------

def pictures_of(table: Table) -> Pictures:
    """Those of a data set as it is."""
    return {split: np.stack([table.splits[split], table.labels[table.splits[split]]], axis=1)
            for split in ("train", "validation", "test")}


def labelled(table: Table, seed: int, count: int) -> Pictures:
    """What a control with that many labels learns from: their pictures, as often round as makes an epoch of all."""
    pictures = pictures_of(table)
    train = pictures["train"]
    kept = few_labels.keep_labels(train[:, 1], count, seed)
    return {**pictures, "train": train[few_labels.rounds(kept, len(train), seed)]}


def with_wrong_labels(table: Table, seed: int, percent: int) -> Pictures:
    """All pictures, of which that many in 100 have a wrong class in train, any of the others alike."""
    pictures = pictures_of(table)
    labels = pictures["train"][:, 1]
    generator = np.random.default_rng(seed)
    others = (labels + generator.integers(1, len(table.classes), len(labels))) % len(table.classes)
    chosen = generator.permutation(len(labels))[:round(len(labels) * percent / 100)]
    labels[chosen] = others[chosen]
    return pictures


def fold(table: Table, seed: int) -> Pictures:
    """Fold number `seed` of all pictures as test, and a tenth of the others as validation.

    Every fold has an equal share of each class, to within one picture.
    """
    pictures = np.concatenate(list(pictures_of(table).values()))
    folds = np.empty(len(pictures), np.int64)
    for label in range(len(table.classes)):
        places = np.random.default_rng(label).permutation(np.flatnonzero(pictures[:, 1] == label))
        folds[places] = np.arange(len(places)) % FOLDS
    others = np.random.default_rng(seed).permutation(np.flatnonzero(folds != seed))
    cut = round(0.1 * len(others))
    return {"train": pictures[np.sort(others[cut:])], "validation": pictures[np.sort(others[:cut])],
            "test": pictures[folds == seed]}


def write_folder(table: Table, pictures: Pictures, root: Path) -> None:
    """A data set as files `root`/SPLIT/CLASS/PLACE.jpg, by a picture's place in its split."""
    for split, listed in pictures.items():
        for place, (row, label) in enumerate(listed.tolist()):
            content = table.read(row)
            assert isinstance(content, bytes)       # as it was encoded
            file = root / split / table.classes[label] / f"{place:05}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    (root / "complete").touch()


# ---- the list ----------------------------------------------------------------------------------------

def one_teacher() -> Named:
    """The recipes on beans. All but `random-head` share one teacher, whose student is not used."""
    best, tutorial = "--recipe best", "--recipe tutorial --size 96 --teacher tf_efficientnet_lite0"
    yield "teacher-of-beans-96", Experiment("beans", f"{best} {TEACHER} --teacher-augment crop --epochs 1", "", [0])
    yield "beans-96-random-head", Experiment(
        "beans", f"{tutorial} {TEACHER} --teacher-epochs 0 --allow-weak-teacher", "", range(5))
    for arm, flags in (("tutorial", tutorial), ("crop-15", f"{best} --epochs 15"), ("crop-30", f"{best} --epochs 30"),
                       ("best", best)):
        yield f"beans-96-{arm}", Experiment("beans", f"{flags} {TAUGHT} --control", "teacher-of-beans-96/seed-0",
                                            range(5))


def few() -> Named:
    """Few labels. All arms see the same labels and take the same number of steps, so that they can be subtracted:

        all         the student learns from the teacher (λ = 1) on all pictures; its control knows the labels only
        smoothing   a control with smoothed labels: what softness alone is worth
        labelled    the student learns from the teacher, on the labelled pictures only: without the other pictures
        hard        the student learns the class that the teacher gives to each view: without softness
        self        the student learns on all pictures from the control of `all`: a teacher that is its equal
        imagenet    the same, but this teacher starts from ImageNet weights, and is fine-tuned on the labels
        patient-3   `all` in three times the steps (patient-10: in ten times)
        pretrained  `all`, where student and control start from ImageNet weights as well

    The weights of the last epoch are tested. So no run chooses anything by its validation pictures, and on beans, which
    has 128 test pictures only, they are counted with those of test.
    """
    for data, labels, epochs, seeds in (
            ("beans", 15, 120, 5), ("beans", 60, 60, 5), ("beans", 120, 40, 5), ("beans", 1034, 12, 3),
            ("caltech101", 505, 24, 5), ("caltech101", 1010, 16, 5)):
        flags, name = f"{FEW[data]} --labels {labels}", f"few/{data}-{labels}"
        first = f"{name}-all/seed-{{seed}}"
        yield f"{name}-all", Experiment(data, f"{flags} {TEACHER} --teacher-epochs {epochs} --control",
                                        seeds=range(seeds))
        arms = {}
        if labels in (60, 505):
            yield f"{name}-labelled", Experiment(f"{data}-{labels}-labelled", f"{FEW[data]} {TAUGHT}", first,
                                                 pictures=partial(labelled, count=labels))
            arms = {"smoothing": f"{TAUGHT} --kd-weight 0 --label-smoothing 0.1", "hard": f"{TAUGHT} --method hard",
                    "self": f"{PEER} --teacher-weights FIRST/control --teacher-epochs 0",
                    "imagenet": f"{PEER} --teacher-weights {MOBILENET} --teacher-epochs {epochs}"}
        if labels == 60:
            arms |= {f"patient-{times}": f"{TAUGHT} --control --epochs {20 * times}" for times in (3, 10)}
        if labels in (60, 1034):
            arms |= {"pretrained": f"{TAUGHT} --control --student-weights {MOBILENET} --lr 1e-3"}
        for arm, its_flags in arms.items():
            yield f"{name}-{arm}", Experiment(data, f"{flags} {its_flags}", first)


def wrong() -> Named:
    """All labels, of which some are wrong in train, the same 20 % among the 40 %. The control has λ = 0."""
    for data, flags in (("beans", FEW["beans"]), ("caltech101", f"{FEW['caltech101']} --epochs 30")):
        for percent in (20, 40):
            name, pictures = f"{data}-wrong-{percent}", partial(with_wrong_labels, percent=percent)
            # A teacher that is fine-tuned for long learns the wrong labels, too.
            yield f"few/{name}", Experiment(name, f"{flags} {TEACHER} --teacher-epochs 4 --control", pictures=pictures)
            yield f"few/{name}-half", Experiment(name, f"{flags} {TAUGHT} --kd-weight 0.5",
                                                 f"few/{name}/seed-{{seed}}", pictures=pictures)


# the flags of a method, of which the last one was tuned; the values that were tried; the best one on validation, and
# of two equal ones the first
METHODS = {
    "smoothing": ("--kd-weight 0 --label-smoothing", "0.05 0.1 0.2", "0.1"),
    "kd": ("--method kd --temperature 2 --kd-weight", "0.5 0.9 1", "1"),
    "kd-standardised": ("--method kd --temperature 2 --standardise --kd-weight", "0.5 0.9 0.99", "0.5"),
    "hard": ("--method hard --kd-weight", "0.5 0.9 1", "0.9"),
    "dkd": ("--method dkd --kd-weight 0.5 --temperature", "1 2 4", "2"),
    "dist": ("--method dist --kd-weight 0.5 --temperature", "1 2 4", "4"),
    "nkd": ("--method nkd --kd-weight 0.5 --temperature", "1 2 4", "4"),
    "pkt": ("--method pkt --kd-weight", "0.1 0.5 0.9", "0.1"),
    "rkd": ("--method rkd --kd-weight", "0.1 0.5 0.9", "0.1"),
    "simkd": ("--method simkd --kd-weight", "0.5 0.9 1", "0.9"),
}
MORE_RUNS = ("kd", "kd-standardised", "dist", "pkt")    # kd, and the three that were best on validation


def methods() -> Named:
    """The methods, with all labels. Each was tuned in a third as long a run of another seed.

    On Caltech-101, all runs of a seed have the teacher of that seed's control, and views are fresh. On beans, they have
    the teachers of few/beans-1034-all, and the values that Caltech-101 chose.
    """
    caltech, tune = (f"{FEW['caltech101']} --views 0 --epochs {epochs}" for epochs in (30, 10))
    beans, beans_first = f"{FEW['beans']} {TAUGHT} --epochs 30", "few/beans-1034-all/seed-{seed}"
    control = f"--kd-weight 0 {TEACHER} --teacher-epochs 8"
    yield "methods/control", Experiment("caltech101", f"{caltech} {control}", "", range(5))
    yield "methods/tune-control", Experiment("caltech101", f"{tune} {control}", "", [100])
    yield "methods/beans-control", Experiment("beans", f"{beans} --kd-weight 0", beans_first)
    for name, (flags, values, best) in METHODS.items():
        for value in values.split():
            yield f"methods/tune-{name}-{value}", Experiment("caltech101", f"{tune} {TAUGHT} {flags} {value}",
                                                             "methods/tune-control/seed-100", [100])
        yield f"methods/{name}", Experiment("caltech101", f"{caltech} {TAUGHT} {flags} {best}",
                                            "methods/control/seed-{seed}", range(5 if name in MORE_RUNS else 3))
        if name in MORE_RUNS:
            yield f"methods/beans-{name}", Experiment("beans", f"{beans} {flags} {best}", beans_first)


def folds() -> Named:
    """Recipe `best` in five folds: run k tests on fold k. The student's views are also turned upside down. By the
    recipe, the teacher has seen no such view in its fine-tuning (`crop-x`).
    """
    for augment in ("crop", "crop-x"):
        yield f"folds/{augment}-30", Experiment(
            "beans-folds", f"--recipe best --control {TEACHER} --teacher-augment {augment} --epochs 30",
            seeds=range(FOLDS), pictures=fold)


EXPERIMENTS = dict([*one_teacher(), *few(), *wrong(), *methods(), *folds()])
RUNS = {f"{name}/seed-{seed}": (experiment, seed)
        for name, experiment in EXPERIMENTS.items() for seed in experiment.seeds}


# ---- making runs -------------------------------------------------------------------------------------

def make(name: str) -> None:
    """Make the run, or go on with it where it was stopped.

    Raises SystemExit where it does not end well, or the first one has not ended, so that none learns from half a
    teacher. train.py refuses a run that was made by other flags.
    """
    experiment, seed = RUNS[name]
    first = OUT / experiment.first.format(seed=seed)
    if experiment.first and not (first / FILE).exists():        # which a run writes when it ends
        sys.exit(f"{first}: make this run first, because its teacher or its control is needed")
    dataset = DATA / experiment.data
    if experiment.pictures:
        dataset = OUT / "pictures" / f"seed-{seed}" / experiment.data
        if not (dataset / "complete").exists():
            table = open_dataset(str(DATA / experiment.data.split("-")[0]))
            write_folder(table, experiment.pictures(table, seed), dataset)

    flags = experiment.flags.replace("FIRST", str(first)).split()
    command = [sys.executable, "train.py", *flags, "--seed", str(seed), "--dataset", str(dataset), "--out",
               str(OUT / name), "--resume"]
    print(shlex.join(command), flush=True)
    if status := subprocess.run(command).returncode:
        sys.exit(status)


if __name__ == "__main__":
    for pattern in sys.argv[1:]:
        for name in fnmatch.filter(RUNS, pattern) or sys.exit(f"{pattern}: no such run in results/experiments.py"):
            make(name)
