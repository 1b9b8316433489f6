"""Experiments of several arms: what is kept of their runs, the differences between arms, and the tables and figures.

    python -m results.arms keep RUN FOLDER      keep what the tables need of a run, as FOLDER/result.json
    python -m results.arms                      print the tables and draw the figures anew

A run keeps megabytes where there are 101 classes. What is kept here is its result without its confusion matrices, and
for each role which pictures of validation and test it had right: a bit for each picture, in the order of the data set.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import numpy as np

from kd.data.frames import decode
from kd.data.sources import open_dataset
from kd.machine import runtime
from kd.models import open_saved
from kd.predict import predict
from kd.tools import report
from kd.tools.predictions import FILE, read_predictions
from results import methods
from results.tables import difference_cell, markdown

HERE = Path(__file__).resolve().parent
Runs = dict[int, dict[str, Any]]        # what is kept of the runs of one arm, by seed


# ---- keeping a run -----------------------------------------------------------------------------------

def keep(run: Path, folder: Path) -> None:
    """Write FOLDER/result.json. Validation is predicted again, because a run keeps only its counts."""
    result = report.read_result(run)
    config = result["config"]
    dataset = open_dataset(config["dataset"], say=lambda line: None)
    test = read_predictions(run / FILE)
    machine = runtime.start("cpu", "off", "off", "off")
    result["right"], result["validation_total"] = {}, len(dataset.splits["validation"].labels)
    for role in report.ROLES:
        if role not in result:
            continue
        confusion = np.array(result[role].pop("confusion"))
        result[role]["test_class_mean"] = float((np.diag(confusion) / confusion.sum(axis=1)).mean())

        model, prep, size, _ = open_saved(str(run / role))
        data = decode(dataset, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                      cache_dir=config["cache_dir"])
        logits = predict(model, data.validation.frames, prep, size, machine, role)
        names = [dataset.splits["validation"].name_of(row) for row in range(len(logits))]
        result["right"][role] = {
            "validation": _as_digits(logits.argmax(1) == data.validation.labels, names),
            "test": _as_digits(test.correct(role), test.names)}
    for key in ("dataset", "teacher_weights", "student_weights", "out", "cache_dir"):
        config[key] = Path(config[key]).name                # not where they lay on one machine
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _as_digits(right: np.ndarray, names: Sequence[str]) -> str:
    """Hexadecimal digits of `(N,)` bool, in the order of the data set.

    The arms that write folders of pictures (`results/few_labels.py`) name each picture by its row.
    """
    rows = [Path(name).stem for name in names]
    if all(row.isdigit() for row in rows) and len(set(rows)) == len(rows):
        right = right[np.argsort([int(row) for row in rows])]
    return np.packbits(right).tobytes().hex()


# ---- comparing arms ----------------------------------------------------------------------------------

class Arm(NamedTuple):
    """One row of a table: its runs in `folder`, and the role that is meant."""

    folder: str             # below results/
    role: str = "student"


def read_runs(folder: str) -> Runs:
    """The kept runs of a folder, by their seed; {} where there are none yet."""
    kept = [json.loads(path.read_text("utf-8")) for path in sorted((HERE / folder).glob("seed-*/result.json"))]
    return {result["config"]["seed"]: result for result in kept}


def right(result: dict[str, Any], role: str, splits: Sequence[str]) -> np.ndarray:
    """Whether a role had each picture of these splits right, `(N,)` int64."""
    totals = {"test": result[role]["test_total"], "validation": result["validation_total"]}
    return np.concatenate([np.unpackbits(np.frombuffer(bytes.fromhex(result["right"][role][split]), np.uint8),
                                         count=totals[split]) for split in splits]).astype(np.int64)


def accuracies(arm: Arm, splits: Sequence[str] = ("test",)) -> list[float]:
    """The share of right pictures of each run."""
    return [right(result, arm.role, splits).mean() for result in read_runs(arm.folder).values()]


def difference(arm: Arm, other: Arm, splits: Sequence[str] = ("test",)) -> dict[str, Any] | None:
    """`arm` − `other` over the seeds that both have: n, mean, sd, and the 95 % interval over runs and pictures."""
    ours, theirs = read_runs(arm.folder), read_runs(other.folder)
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    gains = np.stack([right(ours[seed], arm.role, splits) - right(theirs[seed], other.role, splits)
                      for seed in seeds])
    return {**report.mean_and_sd(gains.mean(axis=1).tolist()), "interval": report.gain_interval(gains)}


def cell(shares: Sequence[float]) -> str:
    """`62.3 ± 1.4 %`; empty for no run."""
    return f"{report.format_mean(report.mean_and_sd(list(shares)))} %" if shares else ""


def versus(arm: Arm, other: Arm, splits: Sequence[str] = ("test",)) -> str:
    """The cell of `arm` − `other`; empty where `difference` has none."""
    values = difference(arm, other, splits)
    return difference_cell(values) if values else ""


# ---- few labels --------------------------------------------------------------------------------------

# the data set and the number of labels
FEW = [("beans", 15), ("beans", 60), ("beans", 120), ("caltech101", 505), ("caltech101", 1010)]
NAMES = {"beans": "beans", "caltech101": "Caltech-101"}
BOTH = ("validation", "test")


def splits_of(kind: str) -> tuple[str, ...]:
    """Beans has 128 test pictures only, so those of validation are counted with them."""
    return BOTH if kind == "beans" else ("test",)


def few_table() -> str:
    """A row for each number of labels: teacher, control, student on all pictures, and the gain."""
    rows = []
    for kind, labels in FEW:
        folder, splits = f"few/{kind}-{labels}-all", splits_of(kind)
        runs = read_runs(folder)
        if not runs:
            continue
        student, control = Arm(folder), Arm(folder, "control")
        by_class = [cell([result[role]["test_class_mean"] for result in runs.values()])
                    for role in ("control", "student")]
        rows.append([NAMES[kind], str(labels), str(len(runs)),
                     *(cell(accuracies(Arm(folder, role), splits)) for role in report.ROLES),
                     versus(student, control, splits), " and ".join(by_class)])
    return markdown(["data", "labels", "n", "teacher", "control", "student", "student − control",
                     "mean per class, control and student"], rows)


PARTS = [
    ("KD on the labelled pictures − control", "labelled", "control"),
    ("label smoothing − control", "smoothing", "control"),
    ("KD on all pictures − on the labelled ones", "all", "labelled"),
    ("KD on all − the teacher's hard labels on all", "all", "hard"),
    ("KD on all − self-training by the control", "all", "self"),
]


def parts_table() -> str:
    """What the gain is made of: differences between two arms that differ in one thing."""
    def arm(kind: str, labels: int, name: str) -> Arm:
        folder = f"few/{kind}-{labels}"
        return Arm(f"{folder}-all", "control") if name == "control" else Arm(f"{folder}-{name}")

    columns = [(kind, labels) for kind, labels in FEW if (HERE / f"few/{kind}-{labels}-hard").is_dir()]
    rows = []
    for label, first, second in PARTS:
        cells = [versus(arm(*column, first), arm(*column, second), splits_of(column[0])) for column in columns]
        rows.append([label, *cells])
    return markdown(["difference", *(f"{NAMES[kind]}, {labels} labels" for kind, labels in columns)], rows)


# ---- the methods -------------------------------------------------------------------------------------

METHODS = ("smoothing", *methods.METHODS)


def methods_table() -> str:
    """A row for each method on Caltech-101: accuracy, mean per class, and the gain over the control and over kd."""
    rows = []
    for name in ("control", *METHODS):
        runs = read_runs(f"methods/{name}")
        if not runs:
            continue
        arm = Arm(f"methods/{name}")
        by_class = [result["student"]["test_class_mean"] for result in runs.values()]
        over = [versus(arm, Arm(f"methods/{other}")) if name != other else "" for other in ("control", "kd")]
        rows.append([name, str(len(runs)), cell(accuracies(arm)), cell(by_class), *over])
    return markdown(["method", "n", "test accuracy", "mean per class", "over the control", "over kd"], rows)


def tables() -> dict[str, str]:
    """Every table by the name that its comment in results/README.md has."""
    return {"few": few_table(), "parts": parts_table(), "methods": methods_table()}


# ---- figures -----------------------------------------------------------------------------------------

def draw_few(file: Path) -> None:
    """Accuracy against the number of labels, a panel for each data set: a dot is a run, a line joins the means."""
    kept = {(kind, labels): f"few/{kind}-{labels}-all" for kind, labels in FEW if read_runs(f"few/{kind}-{labels}-all")}
    kinds = list(dict.fromkeys(kind for kind, _ in kept))
    with report.drawing(file, (7, 2.8), len(kinds)) as panels:
        for axes, kind in zip(panels, kinds, strict=True):
            for role in report.ROLES:
                points = [(labels, 100 * np.array(accuracies(Arm(folder, role), splits_of(kind))))
                          for (other, labels), folder in kept.items() if other == kind]
                for labels, shares in points:
                    axes.plot([labels] * len(shares), shares, "o", color=report.COLOURS[role], alpha=0.5, ms=4, mew=0)
                axes.plot([labels for labels, _ in points], [shares.mean() for _, shares in points], "-",
                          color=report.COLOURS[role], label=role)
            axes.set(title=NAMES[kind], xlabel="labels", xscale="log", ylabel="accuracy, %")
            axes.minorticks_off()
            shown = [labels for other, labels in kept if other == kind]
            axes.set_xticks(shown, [str(labels) for labels in shown])
        panels[0].legend(frameon=False)


def draw_forest(file: Path) -> None:
    """The gain of each method over the control, with its interval."""
    gains = {name: difference(Arm(f"methods/{name}"), Arm("methods/control")) for name in METHODS}
    known = {name: gain for name, gain in gains.items() if gain}
    with report.drawing(file, (7, 0.9 + 0.3 * len(known))) as (axes,):
        for place, gain in enumerate(known.values()):
            low, high = (100 * limit for limit in gain["interval"])
            axes.plot([low, high], [place, place], "-", color=report.COLOURS["student"])
            axes.plot([100 * gain["mean"]], [place], "o", color=report.COLOURS["student"])
        axes.axvline(0, color=report.COLOURS["control"], lw=1)
        axes.set_yticks(range(len(known)), list(known))
        axes.set(xlabel="test accuracy over the control, points", ylim=(len(known) - 0.5, -0.5))


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        for name, table in tables().items():
            print(f"{name}\n\n{table}\n")
        if any(read_runs(f"few/{kind}-{labels}-all") for kind, labels in FEW):
            draw_few(HERE / "few.svg")
        if read_runs("methods/control"):
            draw_forest(HERE / "methods.svg")
