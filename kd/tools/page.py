"""A finished run on one page: report.html, which needs no network, no script and no other file.

    python -m kd page RUN ...       draws it again, from result.json, metrics.jsonl and predictions.npz

Here the page's contents are computed and plotted. page.html.j2 lays them out, and page.css styles them.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from kd import BadInput
from kd.data.frames import Data, Split, center_crop
from kd.machine.files import write_atomic
from kd.methods import TEMPERED
from kd.scores import (SIGNIFICANCE, calibration_bins, compare_paired, format_points, gain_lines, log_softmax, minus,
                       softmax)
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
CLASSES_IN_A_TABLE = 12  # with more classes, the confusion matrix is a picture
CLASSES_ON_A_CARD = 4


# ---- at the end of a run ----------------------------------------------------------------------

def write_report(out: Path, logits: dict[str, np.ndarray], data: Data, where: Callable[[int], str],
                 views: Views, epochs: int) -> Path:
    """Write predictions.npz and report.html of a run that has written its result.json; returns the page's path.

    logits  on test, `(N, C)` by role
    where   the name of a test sample, such as its file
    views   of the student's training, which took `epochs` epochs
    Raises TrainingFault where the disk is full.
    """
    save_predictions(out, logits, data, where, views, epochs)
    return redraw(out)


def save_predictions(out: Path, logits: dict[str, np.ndarray], data: Data, where: Callable[[int], str],
                     views: Views, epochs: int) -> None:
    """Write predictions.npz. Arguments and errors are those of `write_report`."""
    labels = data.test.labels
    shown = np.concatenate([samples[:SHOWN]
                            for samples in find_errors(labels, logits["teacher"], logits["student"])])
    view_pictures, view_labels = sample_views(data.train, views, epochs)
    content = Predictions(
        classes=list(data.classes), labels=labels, names=[where(i) for i in range(len(labels))], logits=logits,
        shown=shown, pictures=thumbnails(data.test, shown, views.size),
        views=view_pictures, view_labels=view_labels)
    write_atomic(out / predictions.FILE, content.to_bytes())


class Errors(NamedTuple):
    """Numbers of the test samples that not both models have right, int64; the most confident mistakes first."""

    student_wrong: np.ndarray  # the teacher is right
    teacher_wrong: np.ndarray  # the student is right
    both_wrong: np.ndarray


def find_errors(labels: np.ndarray, teacher: np.ndarray, student: np.ndarray) -> Errors:
    """Where teacher and student fail, from labels `(N,)` and logits `(N, C)`."""
    teacher_right, student_right = (logits.argmax(1) == labels for logits in (teacher, student))

    def most_confident_first(chosen: np.ndarray, logits: np.ndarray) -> np.ndarray:
        samples = np.flatnonzero(chosen)
        confidence = log_softmax(logits[samples]).max(1)
        return samples[np.argsort(-confidence, kind="stable")]

    return Errors(most_confident_first(teacher_right & ~student_right, student),
                  most_confident_first(~teacher_right & student_right, teacher),
                  most_confident_first(~teacher_right & ~student_right, student))


def thumbnails(split: Split, samples: np.ndarray, size: int) -> np.ndarray:
    """The central `size` × `size` pixels of S samples, made smaller: uint8 `(S, P, P, 3)`, P at most THUMBNAIL."""
    side = min(size, THUMBNAIL)
    pictures = np.empty((len(samples), side, side, 3), np.uint8)
    for picture, frame in zip(pictures, center_crop(split.frames.read(samples), size), strict=True):
        picture[:] = np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BOX))
    return pictures


def sample_views(split: Split, views: Views, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """The first views of some training samples, as the student sees them.

    Returns uint8 `(M, V, size, size, 3)` and the labels `(M,)`.
    """
    count = min(views.used(epochs), VIEWS_OF_A_SAMPLE)
    # evenly over the samples in the order of their classes, so that many classes are seen
    by_class = np.argsort(split.labels, kind="stable")
    places = np.linspace(0, len(split) - 1, min(VIEWS // count, len(split)))
    samples = by_class[places.astype(np.int64)]
    pixels = [load_views(split.frames, samples, view, views, torch.device("cpu"))
              for view in range(count)]
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
    roles = [role for role in ROLES if role in content.logits and role in result]
    history = [entry for entry in history if entry["role"] in roles]
    tempered = result["config"].get("method", "kd") in TEMPERED     # older runs had no choice of a method
    temperature = float(result["config"]["temperature"]) if tempered else 1.0
    select = result["config"].get("select", "best")                 # nor of the weights
    return environment().get_template("page.html.j2").render(
        css=(FOLDER / "page.css").read_text("utf-8"), light=plots.LIGHT, dark=plots.DARK,
        result=result, roles=roles, rows={role: result[role] for role in roles}, tempered=tempered,
        temperature=temperature, gain=gain_from_teacher(result, content),
        select=select, curves={key: plots.curves(history, key, select) for key in ("accuracy", "loss", "train_loss")},
        confusion={role: confusion(np.array(result[role]["confusion"]), role) for role in roles},
        reliability={role: reliability(content, role) for role in roles},
        errors=error_groups(content, temperature), total=len(content.labels),
        sheet=view_sheet(content), views=content.views.shape[1], classes=content.classes,
        time=time_parts(history, float(result["seconds"])))


def environment() -> Environment:
    """jinja2, which escapes every value that the template inserts, and refuses a name that is not defined."""
    jinja = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters.update(percent=format_percent, points=format_points, minus=minus, breakable=breakable,
                         shorten=shorten_path)
    return jinja


# ---- what the page shows ------------------------------------------------------------------------

class Gain(NamedTuple):
    """What the teacher was worth to the student, and what it might have been."""

    paired: dict[str, Any]  # of `kd.scores.compare_paired`
    lines: list[str]        # of `kd.scores.gain_lines`
    headroom: float         # teacher − control, as a share
    within_chance: bool


def gain_from_teacher(result: dict[str, Any], content: Predictions) -> Gain | None:
    """From the predictions, because older results have no `gain`. None for a run without a control."""
    if "control" not in result or "control" not in content.logits:
        return None
    paired = compare_paired(content.logits["student"], content.logits["control"], content.labels)
    headroom = result["teacher"]["test_accuracy"] - result["control"]["test_accuracy"]
    return Gain(paired, gain_lines(result, paired), headroom, paired["p"] > SIGNIFICANCE)


class Confusion(NamedTuple):
    """A confusion matrix: rows are the true class, columns the predicted one."""

    counts: list[list[int]]
    shares: list[list[float]]                   # of the row
    heat_map: plots.Plot | None                 # where there are too many classes for a table
    most_frequent: list[tuple[int, int, int]]   # true class, predicted class, count


def confusion(counts: np.ndarray, role: str) -> Confusion:
    """From counts `(C, C)`."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if len(counts) <= CLASSES_IN_A_TABLE:
        return Confusion(counts.tolist(), shares.tolist(), None, [])
    mistakes = np.argwhere((counts > 0) & ~np.eye(len(counts), dtype=bool)).tolist()
    mistakes.sort(key=lambda cell: -counts[tuple(cell)])
    most_frequent = [(true, predicted, int(counts[true, predicted])) for true, predicted in mistakes[:5]]
    return Confusion(counts.tolist(), shares.tolist(), plots.heat_map(shares, role), most_frequent)


def reliability(content: Predictions, role: str) -> plots.Plot:
    """The bins that the expected calibration error is computed from."""
    confidence = np.exp(log_softmax(content.logits[role]).max(1))
    return plots.reliability(calibration_bins(confidence, content.correct(role)), role)


class Picture(NamedTuple):
    """A JPEG picture as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def jpeg(pixels: np.ndarray, quality: int) -> Picture:
    """Of uint8 `(H, W, 3)`, without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(uri, pixels.shape[1], pixels.shape[0])


class Probability(NamedTuple):
    """What a model gives a class at one temperature."""

    share: float
    verdict: str  # "right" or "wrong" for the class that the model predicts, else ""


class Card(NamedTuple):
    """A test sample that at least one of teacher and student has wrong."""

    sample: int
    picture: Picture
    name: str
    label: str
    predicted: dict[str, str]                       # by role
    temperatures: list[float]                       # the columns of each role
    rows: list[tuple[str, bool, list[Probability]]]  # a class, whether it is the true one, its cells


class ErrorGroup(NamedTuple):
    """The errors of one kind."""

    title: str
    total: int
    cards: list[Card]  # the most confident mistakes


def error_groups(content: Predictions, temperature: float) -> list[ErrorGroup]:
    """The three kinds of errors, with a card for each sample that predictions.npz has a picture of."""
    titles = ("The student is wrong, the teacher right", "The teacher is wrong, the student right", "Both are wrong")
    pictures = dict(zip(content.shown.tolist(), content.pictures, strict=True))
    errors = find_errors(content.labels, content.logits["teacher"], content.logits["student"])
    return [ErrorGroup(title, len(samples), [error_card(content, sample, pictures[sample], temperature)
                                             for sample in samples.tolist() if sample in pictures])
            for title, samples in zip(titles, errors, strict=True)]


def error_card(content: Predictions, sample: int, picture: np.ndarray, temperature: float) -> Card:
    """What teacher and student give the likeliest classes of one test sample, at T = 1 and as they are distilled."""
    label = int(content.labels[sample])
    logits = {role: content.logits[role][sample:sample + 1] for role in ("teacher", "student")}
    predicted = {role: int(values.argmax()) for role, values in logits.items()}
    temperatures = list(dict.fromkeys((1.0, temperature)))

    # a column for each role and temperature, beginning with the teacher's at T = 1
    columns = [(role, softmax(logits[role] / t)[0]) for role in logits for t in temperatures]
    # the true class, the two predicted ones, and what the teacher finds likely
    likely = np.argsort(-columns[0][1], kind="stable")[:CLASSES_ON_A_CARD].tolist()
    classes = list(dict.fromkeys([label, *predicted.values(), *likely]))[:CLASSES_ON_A_CARD]

    def cell(role: str, each: int, share: float) -> Probability:
        verdict = "" if each != predicted[role] else "right" if each == label else "wrong"
        return Probability(share, verdict)

    rows = [(content.classes[each], each == label,
             [cell(role, each, float(shares[each])) for role, shares in columns]) for each in classes]
    return Card(sample, jpeg(picture, 88), content.names[sample], content.classes[label],
                {role: content.classes[each] for role, each in predicted.items()}, temperatures, rows)


def view_sheet(content: Predictions) -> list[tuple[str, list[Picture]]]:
    """For each training sample on the sheet its class, and its views."""
    return [(content.classes[label], [jpeg(pixels, 90) for pixels in views])
            for views, label in zip(content.views, content.view_labels.tolist(), strict=True)]


class TimePart(NamedTuple):
    """A part of a run's wall time."""

    name: str
    role: str       # "other" where it belongs to none
    seconds: float


def time_parts(history: list[dict[str, Any]], total: float) -> list[TimePart]:
    """Where the seconds of a run went, from metrics.jsonl; the parts sum to `total`.

    What lies between two epochs of a role, beyond the training of the second, is evaluation and saving.
    Before a role's first epoch there is also what prepares it, so that it counts as the rest.
    """
    parts = []
    for role in ROLES:
        seconds = sum(entry["seconds"] for entry in history if entry["role"] == role)
        parts.append(TimePart(f"{role}: {'fine-tuning' if role == 'teacher' else 'training'}", role, seconds))

    between = [max(0.0, entry["elapsed"] - before["elapsed"] - entry["seconds"])
               for before, entry in zip(history, history[1:])
               if entry["role"] == before["role"] and "elapsed" in before and "elapsed" in entry]
    parts.append(TimePart("evaluation and saving", "other", sum(between)))

    parts = [part for part in parts if part.seconds]
    rest = max(0.0, total - sum(part.seconds for part in parts))
    return [*parts, TimePart("the rest: decoding, the teacher’s logits, test", "other", rest)]


# ---- filters of the template ----------------------------------------------------------------------

def format_percent(share: float) -> str:
    """`81.2` from a share."""
    return f"{100 * share:.1f}"


def breakable(name: Any) -> Markup:
    """A name, escaped, which a browser may break after an underscore."""
    return escape(str(name)).replace("_", Markup("_<wbr>"))


def shorten_path(name: Any) -> str:
    """The last two parts of a path. The rest says something of a machine, and result.json has it."""
    return "/".join(Path(str(name)).parts[-2:]) if "/" in str(name) else str(name)


def main(argv: list[str]) -> None:
    """Draws the pages, and prints their paths. Raises BadInput, and TrainingFault where the disk is full."""
    parser = arguments.make_parser("page", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run that has ended")
    for run in parser.parse_args(argv).runs:
        print(redraw(Path(run)))
