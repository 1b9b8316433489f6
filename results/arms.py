"""Experiments of several arms: what is kept of their runs, the differences between arms, and the tables and figures.

    python -m results.arms keep FOLDER RUN ...      keep what the tables need of each RUN, in results/FOLDER
    python -m results.arms                          print the tables and draw the figures anew

A run keeps megabytes where there are 101 classes. What is kept here is its result without its confusion matrices, the
true classes, and for each role which pictures of validation and test it had right: a bit for each picture, in the order
of the data set.
"""

import hashlib
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from kd.data.frames import decode
from kd.data.sources import open_dataset
from kd.fast.folding import for_inference
from kd.machine import runtime
from kd.models import open_saved
from kd.predict import predict
from kd.scores import mcnemar_p
from kd.tools import report
from kd.tools.predictions import FILE, read_predictions
from results import methods
from results.folds import FOLDS
from results.tables import difference_cell, markdown

HERE = Path(__file__).resolve().parent
Runs = dict[int, dict[str, Any]]        # what is kept of the runs of one arm, by seed


# ---- keeping a run -----------------------------------------------------------------------------------

def keep(run: Path, folder: Path) -> None:
    """Write ARM/seed-N/result.json into `folder`, by the arm and the seed that the path of `run` ends in.

    Validation is predicted again, because a run keeps only its counts.
    """
    result = report.read_result(run)
    config = result["config"]
    assert run.name == f"seed-{config['seed']}", run
    dataset = open_dataset(config["dataset"], say=lambda line: None)
    test = read_predictions(run / FILE)
    machine = runtime.start("cpu", config["amp"], "off", "off")
    names = {"validation": [dataset.splits["validation"].name_of(row)
                            for row in range(len(dataset.splits["validation"].labels))], "test": list(test.names)}
    labels = {"validation": dataset.splits["validation"].labels, "test": test.labels}
    assert len(dataset.classes) <= 256      # a byte each
    result["labels"] = {split: in_order(labels[split], names[split]).astype(np.uint8).tobytes().hex()
                        for split in labels}
    result["right"] = {}
    for role in report.ROLES:
        if role not in result:
            continue
        del result[role]["confusion"]
        model, prep, size, _ = open_saved(str(run / role))
        if role == "teacher" and config["kernels"] != "off":
            model, _ = for_inference(model.eval(), size)        # as in the run: it rounds differently
        data = decode(dataset, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                      cache_dir=config["cache_dir"])
        logits = predict(model, data.validation.frames, prep, size, machine, role)
        right = {"validation": logits.argmax(1) == labels["validation"], "test": test.correct(role)}
        # It must be the same model and the same pictures. Other processors may round differently.
        assert abs(right["validation"].mean() - result[role]["validation_accuracy"]) < 0.01, (run, role)
        result["right"][role] = {split: np.packbits(in_order(right[split], names[split])).tobytes().hex()
                                 for split in right}
    weights = (run / "teacher" / "model.safetensors").read_bytes()
    result["teacher_sha256"] = hashlib.sha256(weights).hexdigest()
    for key in ("dataset", "teacher_weights", "student_weights", "out", "cache_dir"):
        config[key] = Path(config[key]).name                # not where they lay on one machine
    target = folder / run.parent.name / run.name
    target.mkdir(parents=True, exist_ok=True)
    (target / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def in_order(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """`(N,)`, one for each picture, in the order of the data set.

    The arms that write folders of pictures (`results/few_labels.py`) name each picture by its place in the split.
    """
    rows = [Path(name).stem for name in names]
    if all(row.isdigit() for row in rows) and len(set(rows)) == len(rows):
        return values[np.argsort([int(row) for row in rows])]
    return values


# ---- comparing arms ----------------------------------------------------------------------------------

class Arm(NamedTuple):
    """One row of a table: its runs in `folder`, and the role that is meant."""

    folder: str             # below results/
    role: str = "student"


def read_runs(folder: str) -> Runs:
    """The kept runs of a folder, by their seed; {} where there are none yet. They must have equal settings."""
    kept = [json.loads(path.read_text("utf-8")) for path in sorted((HERE / folder).glob("seed-*/result.json"))]
    for result in kept:
        assert report.deciding(result["config"]) == report.deciding(kept[0]["config"]), folder
    return {result["config"]["seed"]: result for result in kept}


def right(result: dict[str, Any], role: str, splits: Sequence[str]) -> np.ndarray:
    """Whether a role had each picture of these splits right, `(N,)` int64."""
    return np.concatenate([np.unpackbits(_bytes(result["right"][role][split]), count=len(labels_of(result, [split])))
                           for split in splits]).astype(np.int64)


def labels_of(result: dict[str, Any], splits: Sequence[str]) -> np.ndarray:
    """The true class of each picture of these splits, `(N,)` uint8."""
    return np.concatenate([_bytes(result["labels"][split]) for split in splits])


def _bytes(digits: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digits), np.uint8)


def balance(labels: np.ndarray) -> np.ndarray:
    """`(N,)`, a weight for each picture, 1 on average, that gives every class the same sum.

    The weighted mean of right pictures is the mean recall over the classes.
    """
    classes, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / (len(classes) * counts[places])


def accuracies(arm: Arm, splits: Sequence[str] = ("test",), by_class: bool = False) -> list[float]:
    """The share of right pictures of each run; by_class: the mean of the classes' shares."""
    shares = []
    for result in read_runs(arm.folder).values():
        values = right(result, arm.role, splits)
        shares.append((values * balance(labels_of(result, splits))).mean() if by_class else values.mean())
    return shares


# In which settings two arms may always differ. Whether they have the same teacher is seen by its weights.
OF_THE_TEACHER = {"teacher_weights", "teacher_epochs"}


def difference(arm: Arm, other: Arm, splits: Sequence[str] = ("test",), by_class: bool = False,
               allowed: frozenset[str] = frozenset(), level: float = 0.95) -> dict[str, Any] | None:
    """`arm` − `other` over the seeds that both have: n, mean, sd, and the interval over runs and pictures.

    None for fewer than three seeds. The arms must have the same settings but the `allowed` ones, and the same teacher,
    unless "teacher" is among those.
    """
    ours, theirs = read_runs(arm.folder), read_runs(other.folder)
    gains = []
    for seed in sorted(ours.keys() & theirs.keys()):
        one, another = ours[seed], theirs[seed]
        settings = report.differing([report.deciding(result["config"]) for result in (one, another)])
        assert settings.keys() <= allowed | OF_THE_TEACHER, (arm, other, settings)
        assert "teacher" in allowed or one["teacher_sha256"] == another["teacher_sha256"], (arm, other, seed)
        labels = labels_of(one, splits)
        assert np.array_equal(labels, labels_of(another, splits)), (arm, other)
        gain = right(one, arm.role, splits) - right(another, other.role, splits)
        gains.append(gain * balance(labels) if by_class else gain)
    if len(gains) < 3:
        return None
    values = np.stack(gains)
    return {**report.mean_and_sd(values.mean(axis=1).tolist()), "interval": report.gain_interval(values, level)}


def cell(shares: Sequence[float]) -> str:
    """`62.3 ± 1.4 %`; empty for no run."""
    return f"{report.format_mean(report.mean_and_sd(list(shares)))} %" if shares else ""


def versus(arm: Arm, other: Arm, splits: Sequence[str] = ("test",), by_class: bool = False,
           allowed: frozenset[str] = frozenset(), with_n: bool = False) -> str:
    """The cell of `arm` − `other`; empty where `difference` has none. with_n: where the row does not say n."""
    values = difference(arm, other, splits, by_class, allowed)
    if not values:
        return ""
    return difference_cell(values) + (f", n = {values['n']}" if with_n else "")


# ---- few labels --------------------------------------------------------------------------------------

# the data set and the number of labels
FEW = [("beans", 15), ("beans", 60), ("beans", 120), ("beans", 1034), ("caltech101", 505), ("caltech101", 1010)]
NAMES = {"beans": "beans", "caltech101": "Caltech-101"}
BOTH = ("validation", "test")


def splits_of(kind: str) -> tuple[str, ...]:
    """Beans has 128 test pictures only, so those of validation are counted with them."""
    return BOTH if kind == "beans" else ("test",)


def role_cells(folder: str, kind: str, by_class: bool = False) -> list[str]:
    """The accuracies of teacher, control and student, and the gain."""
    splits = splits_of(kind)
    return [*(cell(accuracies(Arm(folder, role), splits, by_class)) for role in report.ROLES),
            versus(Arm(folder), Arm(folder, "control"), splits, by_class)]


ROLE_HEAD = ["n", "teacher", "control", "student", "student − control"]


def labels_table(arm: str, by_class: bool = False) -> str:
    """A row for each number of labels: teacher, control and student of an arm, and the gain.

    by_class: every class counts alike, however many pictures it has.
    """
    rows = []
    for kind, labels in FEW:
        folder = f"few/{kind}-{labels}-{arm}"
        if runs := read_runs(folder):
            rows.append([NAMES[kind], str(labels), str(len(runs)), *role_cells(folder, kind, by_class)])
    return markdown(["data", "labels", *ROLE_HEAD], rows)


# what the difference is called, the two arms, and the settings in which they differ
PARTS = [
    ("label smoothing − control", "smoothing", "control", {"label_smoothing", "kd_weight"}),
    ("KD on the labelled pictures − control", "labelled", "control", {"dataset", "labels"}),
    ("KD on all pictures − on the labelled ones", "all", "labelled", {"dataset", "labels"}),
    ("the teacher's hard labels on all − control", "hard", "control", {"method"}),
    ("KD on all − the teacher's hard labels on all", "all", "hard", {"method"}),
    ("self-training by the control − control", "self", "control", {"teacher", "teacher_size"}),
    ("KD on all − self-training by the control", "all", "self", {"teacher", "teacher_size"}),
    ("a MobileNetV2 from ImageNet as teacher − the control as teacher", "imagenet", "self", {"teacher"}),
    ("KD on all − a MobileNetV2 from ImageNet as teacher", "all", "imagenet", {"teacher", "teacher_size"}),
]


def parts_table() -> str:
    """What the gain is made of: differences between two arms."""
    columns = [(kind, labels) for kind, labels in FEW
               if any((HERE / f"few/{kind}-{labels}-{name}").is_dir() for _, name, _, _ in PARTS if name != "all")]

    def arm(kind: str, labels: int, name: str) -> Arm:
        folder = f"few/{kind}-{labels}"
        return Arm(f"{folder}-all", "control") if name == "control" else Arm(f"{folder}-{name}")

    rows = []
    for label, first, second, allowed in PARTS:
        rows.append([label, *(versus(arm(*column, first), arm(*column, second), splits_of(column[0]),
                                     allowed=frozenset(allowed), with_n=True) for column in columns)])
    return markdown(["difference", *(f"{NAMES[kind]}, {labels} labels" for kind, labels in columns)], rows)


def patience_table() -> str:
    """The same labels in more steps, for student and control alike."""
    rows = []
    for kind, labels in FEW:
        for steps, name in (("1 ×", "all"), ("3 ×", "patient-3"), ("10 ×", "patient-10")):
            folder = f"few/{kind}-{labels}-{name}"
            if (HERE / f"few/{kind}-{labels}-patient-3").is_dir() and (runs := read_runs(folder)):
                rows.append([NAMES[kind], str(labels), steps, str(len(runs)), *role_cells(folder, kind)])
    return markdown(["data", "labels", "steps", *ROLE_HEAD], rows)


def wrong_table() -> str:
    """All labels, of which some are wrong: the control has λ = 0."""
    rows = []
    for kind in NAMES:
        for percent in (20, 40):
            folder, splits = f"few/{kind}-wrong-{percent}", splits_of(kind)
            if not (runs := read_runs(folder)):
                continue
            half = Arm(f"{folder}-half")
            teacher, control, student, gain = role_cells(folder, kind)
            rows.append([NAMES[kind], f"{percent} %", str(len(runs)), teacher, control, cell(accuracies(half, splits)),
                         student, versus(half, Arm(folder, "control"), splits, allowed=frozenset({"kd_weight"})), gain])
    return markdown(["data", "wrong", "n", "teacher", "λ = 0", "λ = 0.5", "λ = 1", "λ = 0.5 − λ = 0", "λ = 1 − λ = 0"],
                    rows)


# ---- the methods -------------------------------------------------------------------------------------

ALLOWED = frozenset({"method", "standardise", "kd_weight", "temperature", "label_smoothing"})


def methods_table(prefix: str = "", splits: Sequence[str] = ("test",)) -> str:
    """A row for each method, with its flags: accuracy, also by class, and what it is over others.

    A star marks a difference whose interval excludes zero even at the level that allows for as many comparisons as
    there are methods (Bonferroni).
    prefix: what stands before a method's name in the name of its folder.
    """
    level = 1 - 0.05 / len(methods.METHODS)

    def over(arm: Arm, other: Arm) -> str:
        strict = difference(arm, other, splits, allowed=ALLOWED, level=level)
        star = " *" if strict and strict["interval"][0] * strict["interval"][1] > 0 else ""
        return versus(arm, other, splits, allowed=ALLOWED) + star

    rows = []
    for name in ("control", *methods.METHODS):
        arm = Arm(f"methods/{prefix}{name}")
        if not (runs := read_runs(arm.folder)):
            continue
        flags, differences = "", ["", ""]
        if name != "control":
            fixed, tuned, _ = methods.METHODS[name]
            value = runs[min(runs)]["config"][tuned[2:].replace("-", "_")]
            flags = f"`{' '.join(fixed)} {tuned} {value:g}`"
            differences = [over(arm, Arm(f"methods/{prefix}{other}")) if name != other else ""
                           for other in ("control", "kd")]
        rows.append([name, flags, str(len(runs)), cell(accuracies(arm, splits)),
                     cell(accuracies(arm, splits, by_class=True)), *differences])
    return markdown(["method", "flags", "n", "accuracy", "mean per class", "over the control", "over kd"], rows)


def steps_table() -> str:
    """What each method costs: milliseconds of a step, that over the control's, and bytes kept of a view."""
    rows = []
    for name, row in json.loads(methods.STEPS.read_text("utf-8"))["methods"].items():
        low, high = row["times_95"]
        times = f"{row['times']:.2f} × ({low:.2f} to {high:.2f})" if name != "control" else ""
        rows.append([name, f"{row['milliseconds']:.0f} ms", times, f"{row['bytes']:,}"])
    return markdown(["method", "step", "times the control's", "bytes a view"], rows)


def tuning_table() -> str:
    """What each method was tuned by: accuracy on validation of three values."""
    rows = []
    for name, values in methods.tuning().items():
        setting = methods.METHODS[name][1]
        shares = ", ".join(f"{value}: {100 * share:.1f} %" for value, share in values.items())
        rows.append([name, f"`{setting}`", shares])
    return markdown(["method", "setting", "accuracy on validation"], rows)


# ---- folds -------------------------------------------------------------------------------------------

def folds_table() -> str:
    """Each picture of beans once: counts over all folds, and the gain with its interval over the pictures."""
    rows = []
    for augment, epochs in itertools.product(("crop", "crop-x"), (30, 200)):
        runs = read_runs(f"folds/{augment}-{epochs}")
        if len(runs) < FOLDS:
            continue
        each = {role: np.concatenate([right(run, role, ["test"]) for run in runs.values()]) for role in report.ROLES}
        gains = each["student"] - each["control"]
        low, high = (100 * limit for limit in report.gain_interval(gains[None]))
        p = mcnemar_p(int((gains > 0).sum()), int((gains < 0).sum()))
        counts = [f"{100 * values.mean():.1f} % ({values.sum()})" for values in each.values()]
        rows.append([str(epochs), f"`{augment}`", str(len(gains)), *counts,
                     f"{100 * gains.mean():+.1f} points ({low:+.1f} to {high:+.1f}), p = {p:.2g}"])
    return markdown(["epochs", "teacher's views", "pictures", "teacher", "control", "student", "student − control"],
                    rows)


TABLES: dict[str, Callable[[], str]] = {
    "few": partial(labels_table, "all"), "by class": partial(labels_table, "all", by_class=True),
    "parts": parts_table, "patience": patience_table, "pretrained": partial(labels_table, "pretrained"),
    "wrong": wrong_table, "methods": methods_table, "methods on beans": partial(methods_table, "beans-", BOTH),
    "tuning": tuning_table, "steps": steps_table, "folds": folds_table}


def tables() -> dict[str, str]:
    """Every table by the name that its comment in results/README.md has."""
    return {name: table() for name, table in TABLES.items()}


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
    gains = {name: difference(Arm(f"methods/{name}"), Arm("methods/control"), allowed=ALLOWED)
             for name in methods.METHODS}
    known = {name: gain for name, gain in gains.items() if gain}
    with report.drawing(file, (7, 0.9 + 0.3 * len(known))) as (axes,):
        for place, gain in enumerate(known.values()):
            low, high = (100 * limit for limit in gain["interval"])
            axes.plot([low, high], [place, place], "-", color=report.COLOURS["student"])
            axes.plot([100 * gain["mean"]], [place], "o", color=report.COLOURS["student"])
        axes.axvline(0, color=report.COLOURS["control"], lw=1)
        axes.set_yticks(range(len(known)), list(known))
        axes.set(xlabel="test accuracy over the control, points", ylim=(len(known) - 0.5, -0.5))


FIGURES = {"few": draw_few, "methods": draw_forest}


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        for run in sys.argv[3:]:
            keep(Path(run), HERE / sys.argv[2])
    else:
        for name, table in tables().items():
            print(f"{name}\n\n{table}\n")
        for name, draw in FIGURES.items():
            draw(HERE / f"{name}.svg")
