"""The runs behind "few labels, many pictures" in results/README.md.

    python -m results.few_labels --kind beans --data FOLDER --labels 60 --teacher-weights FILE --out FOLDER

It makes each run by the command that it prints, one after another. A run that has ended is left alone, and one that was
stopped goes on. So the script may be started again at any time, and several times at once for other labels or seeds.
`all` comes first: the other arms need its models, except `imagenet` and those with wrong labels.

The arms see the same labels and take the same number of steps, so that what the gain is made of can be told:

    all         the student learns from the teacher (λ = 1) on all pictures; its control knows the labels only
    smoothing   a control with smoothed labels: what softness alone is worth
    labelled    the student learns from the teacher, on the labelled pictures only: without the other pictures
    hard        the student learns the class that the teacher gives to each view: without softness
    self        the student learns on all pictures from the control of `all`: a teacher that is its equal
    imagenet    the same, but this teacher starts from ImageNet weights, and is fine-tuned on the labels
    patient-3   `all` in three times the steps (patient-10: in ten times)
    pretrained  `all`, where student and control start from ImageNet weights as well

The arms called `wrong` know all labels, whatever --labels says. In train, 20 or 40 % of them are wrong, the same 20 %
among the 40 %. `wrong-20` and `wrong-40` compare λ = 1 with the control. `wrong-20-half` and `wrong-40-half` have
λ = 0.5. On Caltech-101 they take 30 epochs, as the runs of results.methods do, which have all labels as well.

The weights of the last epoch are tested. So no run chooses anything by its validation pictures, and on beans, which has
128 test pictures only, they are counted with those of test. Validation had chosen the settings before that. The length
on beans is the exception: test helped to choose it (results/README.md).
"""

import argparse
import os
from pathlib import Path
from typing import Sequence

import numpy as np

from kd import few_labels
from kd.data.samples import Dataset, Samples
from kd.data.sources import open_dataset
from kd.machine.files import write_atomic
from results import launch

ARMS = ("all", "smoothing", "labelled", "hard", "self", "imagenet", "patient-3", "patient-10", "pretrained", "wrong-20",
        "wrong-40", "wrong-20-half", "wrong-40-half")
SHARED = ["--recipe", "few", "--allow-weak-teacher"]

# what differs between the data sets, and how long a teacher is fine-tuned on so many labels
KINDS = {"beans": ["--augment", "crop", "--teacher-augment", "crop", "--teacher-size", "224", "--epochs", "20",
                   "--views", "20"],
         "caltech101": ["--size", "64", "--teacher-size", "96", "--epochs", "60", "--views", "20"]}
TEACHER_EPOCHS = {15: 120, 60: 60, 120: 40, 505: 24, 1010: 16, 1034: 12}
WITH_ALL_LABELS = {"beans": [], "caltech101": ["--epochs", "30"]}


Listed = Sequence[tuple[int, int]]      # pictures as (row, label)


def write_folder(classes: tuple[str, ...], splits: dict[str, tuple[Samples, Listed]], root: Path) -> Path:
    """A data set as files `root`/SPLIT/CLASS/PLACE.jpg, by a picture's place in the list of its split.

    A picture is written once. Where it is listed again, it has another name as well.
    """
    if (root / "complete").exists():
        return root
    for split, (samples, listed) in splits.items():
        for place, (row, label) in enumerate(listed):
            stored = root / ".pictures" / split / f"{row}.jpg"
            if not stored.exists():
                content = samples.read(row)
                assert isinstance(content, bytes)       # as it was encoded
                stored.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(stored, content)
            named = root / split / classes[label] / f"{place:05}.jpg"
            named.parent.mkdir(parents=True, exist_ok=True)
            if not named.exists():
                os.link(stored, named)
    (root / "complete").touch()
    return root


def with_train(dataset: Dataset, train: Listed, root: Path) -> Path:
    """The data set as a folder, whose train split has the listed pictures, as often as they are listed."""
    splits: dict[str, tuple[Samples, Listed]] = {
        split: (samples, train if split == "train" else list(enumerate(samples.labels.tolist())))
        for split, samples in dataset.splits.items()}
    return write_folder(dataset.classes, splits, root)


def labelled_folder(dataset: Dataset, labels: int, seed: int, root: Path) -> Path:
    """What the control learns from: the labelled pictures, as often round as makes an epoch of all pictures."""
    known = dataset.splits["train"].labels
    rows = few_labels.rounds(few_labels.keep_labels(known, labels, seed), len(known), seed)
    return with_train(dataset, [(int(row), int(known[row])) for row in rows], root)


def wrong_folder(dataset: Dataset, percent: int, seed: int, root: Path) -> Path:
    """All pictures, of which that many in 100 have a wrong class in train, any of the others alike."""
    labels = dataset.splits["train"].labels.copy()
    generator = np.random.default_rng(seed)
    others = (labels + generator.integers(1, len(dataset.classes), len(labels))) % len(dataset.classes)
    rows = generator.permutation(len(labels))[:round(len(labels) * percent / 100)]
    labels[rows] = others[rows]
    return with_train(dataset, list(enumerate(labels.tolist())), root)


def flags_of(arm: str, seed: int, args: argparse.Namespace, dataset: Dataset) -> list[str]:
    """The flags of one run, after the folders that it reads have been made."""
    flags = [*SHARED, *KINDS[args.kind], "--seed", str(seed)]
    few = ["--dataset", args.data, "--labels", str(args.labels)]
    pictures = args.out / "pictures" / f"seed-{seed}"
    if arm == "all":
        return [*flags, *few, "--teacher-weights", args.teacher_weights, "--teacher-epochs",
                str(TEACHER_EPOCHS[args.labels]), "--control"]
    if arm.startswith("wrong"):
        return [*flags, *wrong_flags(arm, seed, args, dataset, pictures)]
    peer = ["--teacher", "mobilenetv2_100", "--teacher-size", "0"]      # the student's network and pictures
    if arm == "imagenet":
        return [*flags, *few, *peer, "--teacher-weights", args.student_weights, "--teacher-epochs",
                str(TEACHER_EPOCHS[args.labels])]

    # the teacher and the control of `all` serve the other arms
    first = args.out / name_of("all", seed, args)
    launch.must_have_ended(first)
    tuned = ["--teacher-weights", str(first / "teacher"), "--teacher-epochs", "0"]
    if arm == "smoothing":
        return [*flags, *few, *tuned, "--kd-weight", "0", "--label-smoothing", "0.1"]
    if arm == "labelled":
        folder = labelled_folder(dataset, args.labels, seed, pictures / f"{args.kind}-{args.labels}-labelled")
        return [*flags, "--dataset", str(folder), *tuned]
    if arm == "hard":
        return [*flags, *few, *tuned, "--method", "hard"]
    if arm == "self":
        return [*flags, *few, *peer, "--teacher-weights", str(first / "control"), "--teacher-epochs", "0"]
    if arm == "pretrained":
        return [*flags, *few, *tuned, "--control", "--student-weights", args.student_weights, "--lr", "1e-3"]
    _, times = arm.split("-")       # of a patient one
    epochs = int(flags[flags.index("--epochs") + 1])
    return [*flags, *few, *tuned, "--control", "--epochs", str(int(times) * epochs)]


def wrong_flags(arm: str, seed: int, args: argparse.Namespace, dataset: Dataset, pictures: Path) -> list[str]:
    """What is special about a run with wrong labels."""
    _, percent, *half = arm.split("-")
    folder = wrong_folder(dataset, int(percent), seed, pictures / f"{args.kind}-wrong-{percent}")
    flags = [*WITH_ALL_LABELS[args.kind], "--dataset", str(folder)]
    if half:
        first = args.out / name_of(f"wrong-{percent}", seed, args)
        launch.must_have_ended(first)
        return [*flags, "--teacher-weights", str(first / "teacher"), "--teacher-epochs", "0", "--kd-weight", "0.5"]
    # A teacher that is fine-tuned for long learns the wrong labels, too.
    return [*flags, "--teacher-weights", args.teacher_weights, "--teacher-epochs", "4", "--control"]


def name_of(arm: str, seed: int, args: argparse.Namespace) -> str:
    """The folder of a run below --out."""
    labels = "" if arm.startswith("wrong") else f"-{args.labels}"
    return f"{args.kind}{labels}-{arm}/seed-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data set")
    parser.add_argument("--kind", required=True, choices=tuple(KINDS))
    parser.add_argument("--labels", required=True, type=int, choices=tuple(TEACHER_EPOCHS))
    parser.add_argument("--teacher-weights", required=True, help="ImageNet weights of the teacher")
    parser.add_argument("--student-weights", help="ImageNet weights of MobileNetV2, for imagenet and pretrained")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    args = parser.parse_args()
    if {"imagenet", "pretrained"} & set(args.arms) and not args.student_weights:
        parser.error("the arms imagenet and pretrained need --student-weights; give them, or choose other --arms")
    dataset = open_dataset(args.data, say=lambda line: None)
    for arm in args.arms:
        for seed in args.seeds:
            launch.train(flags_of(arm, seed, args, dataset), args.out / name_of(arm, seed, args), args.cache_dir)


if __name__ == "__main__":
    main()
