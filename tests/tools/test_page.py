"""The page of a run: what it shows against what the run's files hold, parsed as HTML and looked at by a browser."""

import base64
import dataclasses
import html
import io
import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image

import train
from kd import BadInput
from kd.augmentations import AUGMENTATIONS
from kd.data.frames import Data
from kd.scores import compare_paired, confusions, gain_lines, scores
from kd.tools import page, plots
from kd.tools.predictions import read_predictions
from kd.views import Views, load_views
from tests.conftest import tiny_config
from tests.helpers import browser

VOID = {"meta", "link", "img", "wbr"}
BREAKOUT = "\"><img src=x onerror='alert(1)'>{{ 7 * 7 }}"  # ends an attribute, and would be a template's expression
ROLES = ("teacher", "control", "student")


class Parsed(HTMLParser):
    """Tags with their attributes, and tables as rows of cells; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "span" and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def errors(self) -> list[int]:
        """The test samples that are shown as errors."""
        return [int(str(attributes["data-sample"])) for _, attributes in self.tags if "data-sample" in attributes]


class Numbered:
    """A split whose frames have their number in the red channel, and a gradient in the others."""

    def __init__(self, labels: np.ndarray, side: int = 46, odd: str = "") -> None:
        self.labels, self.shape, self.odd = labels, (len(labels), side, side, 3), odd

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, row: int) -> str:
        return f"/home/somebody/photos/{self.odd} & {row}.jpg"

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        made = np.empty((len(rows), *self.shape[1:]), np.uint8) if out is None else out
        made[..., 0] = rows[:, None, None]
        made[..., 1] = np.arange(self.shape[2])
        made[..., 2] = np.arange(self.shape[1])[:, None]
        return made


def make_run(out: Path, classes: tuple[str, ...], count: int = 60, odd: str = "", skill: float = 1.0) -> Path:
    """A run's files, without the training: random logits. odd: at the end of each text from outside."""
    generator, total = np.random.default_rng(0), len(classes)
    labels = generator.integers(0, total, count)
    logits = {role: generator.normal(0, 1.5, (count, total)) + 3 * skill * times * np.eye(total)[labels]
              for role, times in zip(ROLES, (1.5, 0.7, 1.0))}
    history = [{"role": role, "epoch": epoch, "accuracy": 0.5 + epoch / 10, "loss": 1 / epoch, "train_loss": 2 / epoch}
               for role in ROLES for epoch in (1, 2, 3)]
    result: dict[str, Any] = {
        role: {"model": f"{role}_net{odd}", "params": 1234567, "validation_accuracy": 0.8,
               **{f"test_{key}": value for key, value in scores(logits[role], labels).items()}} for role in ROLES}
    result |= {"config": {"dataset": f"/home/somebody/data/my photos{odd}", "size": 40, "epochs": 3, "method": "kd",
                          "standardise": False, "temperature": 4.0, "kd_weight": 0.5, "seed": 0, "select": "best",
                          "augment": f"crop{odd}"},
               "gain": compare_paired(logits["student"], logits["control"], labels), "seconds": 200.0,
               "images_per_second": 31.4, "commit": f"c{odd}", "environment": {f"cpu{odd}": f"fast{odd}"}}
    out.mkdir()
    (out / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (out / "result.json").write_text(json.dumps(result))
    splits: list[Any] = [Numbered(each, odd=odd) for each in (np.arange(30) % total, labels, labels)]
    data = Data(classes, *splits)
    page.write_report(out, logits, data, Views(0, 40, AUGMENTATIONS["crop"], count=6), epochs=30)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", ("healthy", "rust", "a_rather_long_name_of_a_class"))


@pytest.fixture(scope="module")
def text(run) -> str:
    return (run / "report.html").read_text()


def test_nothing_comes_from_elsewhere_and_every_picture_decodes(text):
    assert text.startswith("<!DOCTYPE html>") and not re.findall(r"https?:|<script|url\(|@import", text)
    assert "somebody" not in text  # the end of a path finds the picture; the rest is nobody's business
    parsed = Parsed(text)
    kinds = {"svg+xml": 0, "jpeg": 0}
    for tag, attributes in parsed.tags:
        for name in {"src", "href", "srcset", "action", "data"} & attributes.keys():
            assert str(attributes[name]).startswith("data:")
        if tag == "img":
            assert attributes["alt"] and attributes["width"] and attributes["height"]
            kind, data = str(attributes["src"]).removeprefix("data:image/").split(";base64,")
            content = base64.b64decode(data, validate=True)
            kinds[kind] += 1
            if kind == "jpeg":
                assert Image.open(io.BytesIO(content)).size == (40, 40)
            else:
                assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
                assert not re.findall(rb'href="(?!#)|<image', content)  # nor does a drawing ask for anything
    cards = len(parsed.errors())
    assert kinds == {"svg+xml": 3, "jpeg": 4 * 6 + cards} and cards > 3


def test_the_tables_and_the_gain_are_those_of_the_result(run, text):
    result = json.loads((run / "result.json").read_text())
    content = read_predictions(run / "predictions.npz")
    results, *tables = Parsed(text).tables[:4]
    head, *rows, last = results
    assert head == ["model", "test accuracy", "macro-F1", "parameters"]
    assert rows == [[f"{role} {row['model']}",
                     f"{100 * row['test_accuracy']:.1f} % {row['test_correct']}/{row['test_total']}",
                     f"{row['test_macro_f1']:.3f}", f"{row['params']:,}"]
                    for role, row in ((role, result[role]) for role in ROLES)]
    gain = result["student"]["test_correct"] - result["control"]["test_correct"]
    assert last[1] == f"{100 * gain / 60:+.1f} points {gain:+d} images".replace("-", "−")
    for table, role in zip(tables, ROLES, strict=True):
        counts = page.matrix(confusions(content.labels, content.logits[role].argmax(1)), 3)
        assert [[int(cell) for cell in line[1:]] for line in table[1:]] == counts.tolist()

    for line in gain_lines({role: result[role] for role in ROLES}, result["gain"]):
        assert f"<p>{html.escape(line)}</p>" in text    # in the words of the console
    headroom = result["teacher"]["test_correct"] - result["control"]["test_correct"]
    assert f"student − control, {gain:+d} of 60 images, p = {result['gain']['p']:.2g}" in text
    assert f"teacher − control, {headroom:+d} of 60 images" in text


def test_a_run_without_a_control_says_so_and_only_some_methods_have_a_temperature(run, text):
    content, result = read_predictions(run / "predictions.npz"), json.loads((run / "result.json").read_text())
    assert "kd, T = 4, λ = 0.5" in text and "Without <code>--control</code>" not in text
    del result["control"], result["gain"]
    result["config"]["method"] = "hard"
    text = page.render(result, [], content)
    assert "hard, λ = 0.5" in text and "Without <code>--control</code>" in text


@pytest.mark.parametrize("classes", [3, 20])
def test_no_name_becomes_markup_wherever_it_stands(tmp_path, monkeypatch, classes):
    """Every string of the run's files is hostile: classes, test samples, models, settings, machine, commit."""
    monkeypatch.setattr(plots, "curves", lambda *_: "data:,")  # roles are all that a plot names
    out = make_run(tmp_path / "run", tuple(f"{i}{BREAKOUT}" for i in range(classes)), odd=BREAKOUT)
    text = (out / "report.html").read_text()
    parsed = Parsed(text)
    assert "<img src=x" not in text
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    # as text it is all there: in cells, paragraphs and descriptions of pictures
    cells = [cell for table in parsed.tables for row in table for cell in row]
    for expected in ("student student_net", "crop", "cpu", "fast", "c", "0"):
        assert f"{expected}{BREAKOUT}" in cells
    assert f"my photos{html.escape(BREAKOUT)}, 40 px" in text.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")
    assert sum(BREAKOUT in str(attributes.get("alt")) for _, attributes in parsed.tags) > 24


def test_a_name_that_the_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        page.environment().from_string("{{ nothing }}").render()


def test_the_errors_are_those_of_the_logits(run, text):
    content = read_predictions(run / "predictions.npz")
    labels, teacher, student = content.labels, content.logits["teacher"], content.logits["student"]
    right = [(logits.argmax(1) == labels) for logits in (teacher, student)]
    expected = []
    for title, chosen, logits in (("The student is wrong, the teacher right", right[0] & ~right[1], student),
                                  ("The teacher is wrong, the student right", ~right[0] & right[1], teacher),
                                  ("Both are wrong", ~right[0] & ~right[1], student)):
        numbers = np.flatnonzero(chosen)
        confidence = torch.softmax(torch.from_numpy(logits).double(), 1).amax(1).numpy()[numbers]
        expected += numbers[np.argsort(-confidence, kind="stable")][:page.SHOWN].tolist()
        assert f"<h3>{title}: {len(numbers)} of 60</h3>" in text
    parsed = Parsed(text)
    cards = parsed.errors()
    assert cards == expected == content.shown.tolist()
    assert [int(picture[..., 0].mean()) for picture in content.pictures] == cards  # each card has its own picture
    table = parsed.tables[4]
    assert table[0] == ["%", "teacher", "student"] and table[1][0] == content.classes[labels[cards[0]]]
    for name, *shares in table[1:]:
        label = content.classes.index(name)
        assert shares == [f"{100 * torch.softmax(torch.from_numpy(logits[cards[0]]), 0)[label]:.0f}"
                          for logits in (teacher, student)]


def test_a_run_without_errors_shows_none(tmp_path):
    text = (make_run(tmp_path / "run", ("a", "b"), skill=100.0) / "report.html").read_text()
    assert "<h3>Both are wrong: 0 of 60</h3>" in text and not Parsed(text).errors()


def test_of_many_classes_the_worst_are_named(tmp_path):
    out = make_run(tmp_path / "run", tuple(f"class_{i}_{'x' * 30}" for i in range(20)), count=300, skill=0.5)
    content = read_predictions(out / "predictions.npz")
    counts = page.matrix(confusions(content.labels, content.logits["student"].argmax(1)), 20)
    worst = Parsed((out / "report.html").read_text()).tables[3]
    assert len(worst) == page.CLASSES_IN_A_TABLE
    recall = {name: counts[i, i] / counts[i].sum() for i, name in enumerate(content.classes)}
    assert [share for _, share, _ in worst] == [f"{100 * share:.0f} %" for share in sorted(recall.values())[:12]]
    for name, share, other in worst:
        row = counts[content.classes.index(name)].copy()
        row[content.classes.index(name)] = 0
        assert share == f"{100 * recall[name]:.0f} %" and row[content.classes.index(other)] == row.max()


@pytest.mark.parametrize("count, epochs, shape", [(2, 30, (9, 2)), (0, 30, (4, 6)), (0, 2, (9, 2))])
def test_the_sheet_has_the_very_views_of_training(count, epochs, shape):
    split: Any = Numbered(np.arange(9) % 3, side=40)
    views = Views(seed=3, size=32, augmentation=AUGMENTATIONS["crop"], count=count)
    pictures, labels = page.sample_views(split, views, epochs)
    assert pictures.shape == (*shape, 32, 32, 3)
    by_class = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    samples = np.array(by_class if shape[0] == 9 else [0, 6, 7, 8])     # evenly over the classes
    assert np.array_equal(labels, samples % 3)
    for view in range(shape[1]):
        expected = load_views(split, samples, view, views, torch.device("cpu"))
        assert np.array_equal(pictures[:, view], expected.permute(0, 2, 3, 1).numpy())


def test_the_command_draws_the_same_page_again_and_names_what_it_lacks(run, text, tmp_path, capsys):
    (run / "report.html").unlink()
    page.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == text
    for name in ("result.json", "predictions.npz"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    for broken in (None, "{"):
        if broken:
            (tmp_path / "metrics.jsonl").write_text(broken)
        with pytest.raises(BadInput, match="metrics.jsonl: not readable .* give the folder of a run that has ended"):
            page.main([str(tmp_path)])


def test_a_run_ends_with_its_page_and_a_fault_in_drawing_costs_only_the_page(photos, tmp_path, monkeypatch):
    tiny = tiny_config(photos, tmp_path)
    out = Path(tiny.out)
    with monkeypatch.context() as broken:
        broken.setattr(page, "render", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a bug is not swallowed
            train.main(tiny)
    before = (out / "result.json").read_bytes()
    assert not (out / "report.html").exists() and zipfile.is_zipfile(out / "predictions.npz")
    monkeypatch.setattr(train, "train_step", lambda *_, **__: 1 / 0)  # nothing is trained again
    result = train.main(dataclasses.replace(tiny, resume=True))
    assert (out / "result.json").read_bytes() == before and json.loads(before) == result
    assert Parsed((out / "report.html").read_text()).tables[0][2][1] == (
        f"{100 * result['student']['test_accuracy']:.1f} % {result['student']['test_correct']}/12")
    content = read_predictions(out / "predictions.npz")
    assert scores(content.logits["student"], content.labels)["correct"] == result["student"]["test_correct"]
    assert content.names[5].endswith("test/plain/1.png") and content.classes == ["blob", "plain", "stripes"]


def test_a_phone_shows_it_without_sideways_scrolling_requests_or_complaints(run):
    path = browser.find()
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(browser.NAMES)}")
    with browser.Browser(path) as window:
        for width in (390, 1280):
            window.open(run / "report.html", width, "light")
            assert window.value("innerWidth") == width
            assert window.value("document.documentElement.scrollWidth <= innerWidth")
            assert window.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            requests = [address for address in window.requests() if not address.startswith("data:")]
            assert requests == [(run / "report.html").as_uri()] and window.complaints() == []
