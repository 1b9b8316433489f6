"""A finished run on one page: report.html, which needs no network, no script and no other file.

    python -m kd page RUN ...       draws it again, from result.json, metrics.jsonl and predictions.npz

Here the page's contents are computed. plots.py draws the curves, page.html.j2 lays all out, and page.css styles it.
"""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from kd import BadInput
from kd.data.frames import Data, Split, center_crop
from kd.machine.files import write_atomic
from kd.losses import TEMPERED
from kd.scores import confusions, format_points, gain_lines, log_softmax, minus, softmax
from kd.tools import arguments, plots, predictions
from kd.tools.predictions import ROLES, Predictions, read_predictions
from kd.tools.report import read_result
from kd.views import Views, load_views

FILE = "report.html"
FOLDER = Path(__file__).parent   # of the template and the style sheet

SHOWN = 8                # test pictures of each kind of error
THUMBNAIL = 160          # pixels, the longest side of such a picture
VIEWS = 24               # pictures on the sheet of views
VIEWS_OF_A_SAMPLE = 6    # on the sheet, at most
CLASSES_IN_A_TABLE = 12  # with more classes, the page names as many of the worst, and has no confusion matrix
CLASSES_ON_A_CARD = 4


# ---- at the end of a run ----------------------------------------------------------------------

def write_report(out: Path, logits: dict[str, np.ndarray], data: Data, views: Views,
                 epochs: int) -> Path:
    """Write predictions.npz and report.html of a run that has written its result.json; returns the page's path.

    logits   on test, `(N, C)` by role
    views    of the student's training, which took `epochs` epochs
    Raises TrainingFault where the disk is full.
    """
    labels = data.test.labels
    errors = find_errors(labels, logits["teacher"], logits["student"])
    shown = np.concatenate([samples[:SHOWN] for samples in errors.values()])
    view_pictures, view_labels = sample_views(data.train, views, epochs)
    content = Predictions(
        classes=list(data.classes), labels=labels, names=[data.test.name_of(row) for row in range(len(labels))],
        logits=logits, shown=shown, pictures=thumbnails(data.test, shown, views.size),
        views=view_pictures, view_labels=view_labels)
    write_atomic(out / predictions.FILE, content.to_bytes())
    return redraw(out)


def find_errors(labels: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> dict[str, np.ndarray]:
    """Where teacher and student fail, from labels `(N,)` and logits `(N, C)`.

    Returns, by the kind of error, the numbers of the test samples, int64, with the most confident mistakes first.
    """
    teacher_wrong, student_wrong = (logits.argmax(1) != labels for logits in (teacher, student))

    errors = {}
    for kind, chosen, logits in (("The student is wrong, the teacher right", student_wrong & ~teacher_wrong, student),
                                 ("The teacher is wrong, the student right", teacher_wrong & ~student_wrong, teacher),
                                 ("Both are wrong", teacher_wrong & student_wrong, student)):
        samples = np.flatnonzero(chosen)
        errors[kind] = samples[np.argsort(-log_softmax(logits[samples]).max(1), kind="stable")]
    return errors


def thumbnails(split: Split, samples: np.ndarray, size: int) -> np.ndarray:
    """The central `size` × `size` pixels of S samples, made smaller: uint8 `(S, P, P, 3)`, P at most THUMBNAIL."""
    side = min(size, THUMBNAIL)
    pictures = [np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BOX))
                for frame in center_crop(split.read(samples), size)]
    return np.array(pictures, np.uint8).reshape(-1, side, side, 3)


def sample_views(split: Split, views: Views, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """The first views of some training samples, as the student sees them.

    Returns uint8 `(M, V, size, size, 3)` and the labels `(M,)`.
    """
    count = min(views.used(epochs), VIEWS_OF_A_SAMPLE)
    # evenly over the samples in the order of their classes, so that many classes are seen
    by_class = np.argsort(split.labels, kind="stable")
    samples = by_class[np.linspace(0, len(split) - 1, min(VIEWS // count, len(split))).astype(np.int64)]
    pixels = [load_views(split, samples, view, views, torch.device("cpu")) for view in range(count)]
    return torch.stack(pixels, 1).permute(0, 1, 3, 4, 2).numpy(), split.labels[samples]


# ---- the page from the files of a run -----------------------------------------------------------

def redraw(out: Path) -> Path:
    """Write report.html from the run's other files; returns its path. Raises BadInput where one is absent or broken."""
    result = read_result(out)
    content = read_predictions(out / predictions.FILE)
    metrics = out / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{metrics}: not readable ({error}); give the folder of a run that has ended") from error
    write_atomic(out / FILE, render(result, history, content).encode())
    return out / FILE


def render(result: dict[str, Any], history: list[dict[str, Any]], content: Predictions) -> str:
    """The page as HTML, from what result.json, metrics.jsonl and predictions.npz hold."""
    rows = {role: result[role] for role in ROLES if role in result}
    probabilities = {role: softmax(content.logits[role]) for role in ("teacher", "student")}
    answers = {role: confusions(content.labels, content.logits[role].argmax(1)) for role in rows}
    return environment().get_template("page.html.j2").render(
        css=(FOLDER / "page.css").read_text("utf-8"), palette=plots.PALETTE, result=result, rows=rows,
        tempered=result["config"]["method"] in TEMPERED,
        gain_lines=gain_lines(rows, result["gain"]) if "gain" in result else [],
        curves=[(title, plots.curves(history, key, result["config"]["select"])) for title, key in (
            ("Validation accuracy", "accuracy"), ("Validation loss, cross-entropy", "loss"),
            ("Training loss", "train_loss"))],
        confusions=answers, few_classes=len(content.classes) <= CLASSES_IN_A_TABLE, hardest=hardest, content=content,
        errors=find_errors(content.labels, content.logits["teacher"], content.logits["student"]),
        thumbnails=dict(zip(content.shown, content.pictures, strict=True)), probabilities=probabilities,
        likely=likely, matrix=lambda found: matrix(found, len(content.classes)))


def environment() -> Environment:
    """jinja2, which escapes every value that the template inserts, and refuses a name that is not defined."""
    jinja = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters.update(points=format_points, minus=minus, breakable=breakable, shorten=shorten_path, jpeg=jpeg)
    return jinja


# ---- what the template asks for -------------------------------------------------------------------

def matrix(pairs: list[tuple[int, int, int]], classes: int) -> np.ndarray:
    """`confusions` as counts `(C, C)`: a row is the true class, a column the predicted one."""
    counts = np.zeros((classes, classes), np.int64)
    for true, predicted, count in pairs:
        counts[true, predicted] = count
    return counts


def hardest(pairs: list[tuple[int, int, int]]) -> list[tuple[int, float, int]]:
    """The worst classes of `confusions`: the class, the share that is right, what it is most often taken for."""
    total: Counter[int] = Counter()
    right: Counter[int] = Counter()
    taken_for: dict[int, int] = {}
    for true, predicted, count in pairs:
        total[true] += count
        if true == predicted:
            right[true] = count
        else:
            taken_for.setdefault(true, predicted)
    worst = sorted(taken_for, key=lambda label: right[label] / total[label])
    return [(label, right[label] / total[label], taken_for[label]) for label in worst[:CLASSES_IN_A_TABLE]]


def likely(label: int, teacher: np.ndarray, student: np.ndarray) -> list[int]:
    """Classes of one sample: the true one, the two predicted ones, and what else the teacher finds likely.

    teacher, student: their probabilities `(C,)`.
    """
    by_teacher = np.argsort(-teacher, kind="stable")
    return list(dict.fromkeys([label, by_teacher[0], student.argmax(), *by_teacher]))[:CLASSES_ON_A_CARD]


def jpeg(pixels: np.ndarray) -> str:
    """uint8 `(H, W, 3)` as a data URI, without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return plots.data_uri("jpeg", buffer.getvalue())


def breakable(name: Any) -> Markup:
    """A name, escaped, which a browser may break after an underscore."""
    return escape(str(name)).replace("_", Markup("_<wbr>"))


def shorten_path(name: Any) -> str:
    """The last two parts of a path. The rest says something of a machine, and result.json has it."""
    return "/".join(Path(str(name)).parts[-2:]) if "/" in str(name) else str(name)


def main(argv: list[str]) -> None:
    """Draws the pages, and prints their paths. Raises BadInput, and TrainingFault where the disk is full."""
    parser = arguments.make_parser("page", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="the folder of a run that has ended")
    for run in parser.parse_args(argv).runs:
        print(redraw(run))
