"""Cross-validation of recipe `best` in five folds.

    python -m results.folds --data FOLDER --teacher-weights FILE --out FOLDER --cache-dir FOLDER

All pictures of beans, whatever split they belong to, are divided into five folds with equal shares of each class. Run
number k tests on fold k. So each picture is tested once, by models that have not seen it: the teacher is fine-tuned
anew in each run. A tenth of the other pictures is validation, which chooses the epoch.

The student's views are also turned upside down. By the recipe, the teacher has seen no such view in its fine-tuning
(`crop-x`). With `--teacher-augment crop` it has.

It makes each run by the command that it prints, one after another. A run that has ended is left alone, and one that was
stopped goes on.
"""

import argparse
from pathlib import Path

import numpy as np

from kd.data.samples import Dataset, Samples, joined
from kd.data.sources import open_dataset
from results import launch
from results.few_labels import Listed, write_folder

FOLDS = 5
VALIDATION_SHARE = 0.1
FLAGS = ["--recipe", "best", "--control"]


def fold_of(labels: np.ndarray) -> np.ndarray:
    """(N,) int64, the fold of each picture: every fold has an equal share of each class, to within one picture."""
    folds = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.random.default_rng(int(label)).permutation(np.flatnonzero(labels == label))
        folds[rows] = np.arange(len(rows)) % FOLDS
    return folds


def fold_folder(dataset: Dataset, fold: int, root: Path) -> Path:
    """The data set with that fold as its test split, and a tenth of the others as validation."""
    pictures = joined([dataset.splits[split] for split in ("train", "validation", "test")])
    in_test = fold_of(pictures.labels) == fold
    others = np.random.default_rng(fold).permutation(np.flatnonzero(~in_test))
    cut = round(VALIDATION_SHARE * len(others))
    rows = {"train": np.sort(others[cut:]), "validation": np.sort(others[:cut]), "test": np.flatnonzero(in_test)}
    listed: dict[str, tuple[Samples, Listed]] = {
        split: (pictures, [(int(row), int(pictures.labels[row])) for row in chosen])
        for split, chosen in rows.items()}
    return write_folder(dataset.classes, listed, root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="beans")
    parser.add_argument("--teacher-weights", required=True, help="ImageNet weights of the teacher")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--epochs", nargs="+", type=int, default=[30, 200])
    parser.add_argument("--teacher-augment", default="crop-x", choices=("crop-x", "crop"))
    parser.add_argument("--folds", nargs="+", type=int, default=range(FOLDS))
    args = parser.parse_args()
    dataset = open_dataset(args.data, say=lambda line: None)
    for epochs in args.epochs:
        for fold in args.folds:
            folder = fold_folder(dataset, fold, args.out / "pictures" / f"fold-{fold}" / "beans")
            flags = [*FLAGS, "--dataset", str(folder), "--teacher-weights", args.teacher_weights,
                     "--teacher-augment", args.teacher_augment, "--epochs", str(epochs), "--seed", str(fold)]
            run = args.out / f"{args.teacher_augment}-{epochs}" / f"seed-{fold}"
            launch.train(flags, run, args.cache_dir)


if __name__ == "__main__":
    main()
