"""The page of a run: what it shows against what the run's files hold, parsed as HTML and looked at by a browser."""

import base64
import io
import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image

import train
from kd import BadInput
from kd.augmentations import AUGMENTATIONS
from kd.data.frames import Data, Split
from kd.scores import Bin, gain_lines, mcnemar_p, scores
from kd.tools import page, plots
from kd.tools.predictions import Predictions, read_predictions
from kd.views import Views, load_views
from tests.conftest import tiny_config
from tests.helpers import browser
from tests.helpers.frames import noise

VOID = {"meta", "link", "img", "source", "wbr", "br"}
HOSTILE = "<script>alert(1)</script>"
NO_PLOT = plots.Plot("data:,", "data:,", 1, 1)
BREAKOUT = "\"><img src=x onerror='alert(1)'>{{ 7 * 7 }}"  # ends an attribute, and would be a template's expression


class Parsed(HTMLParser):
    """Tags with their attributes, tables as rows of cells, headings and paragraphs; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.paragraphs: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h2", "h3"):
            self.headings.append("")
        elif tag == "p":
            self.paragraphs.append("")
        elif tag == "span" and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif {"h2", "h3"} & set(self.open):
            self.headings[-1] += data
        elif "p" in self.open:
            self.paragraphs[-1] += data

    def errors(self) -> list[int]:
        """The test samples that are shown as errors."""
        return [int(str(attributes["data-sample"])) for _, attributes in self.tags if "data-sample" in attributes]


class Fakes(NamedTuple):
    """Frames that are each filled with their number."""

    total: int
    shape: tuple[int, ...] = (0, 46, 46, 3)

    def __len__(self) -> int:
        return self.total

    def read(self, numbers: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        made = np.ones((len(numbers), 46, 46, 3), np.uint8) * numbers.astype(np.uint8)[:, None, None, None]
        if out is not None:
            out[:] = made
        return made


def make_data(classes: tuple[str, ...], test_labels: np.ndarray) -> Data:
    train_split = Split(Fakes(30), np.arange(30) % len(classes))   # type: ignore[arg-type]
    test_split = Split(Fakes(len(test_labels)), test_labels)       # type: ignore[arg-type]
    return Data(classes, train_split, test_split, test_split)


def make_run(out: Path, classes: tuple[str, ...], count: int = 60, control: bool = True, views: int = 6,
             name: str = HOSTILE, suffix: str = "") -> Path:
    """A run's files, without the training: random logits that are right more often than not.

    name: of the data set and of every test sample; suffix: of the models, settings and so on.
    """
    generator, total = np.random.default_rng(0), len(classes)
    labels = generator.integers(0, total, count)
    roles = ("teacher", "control", "student") if control else ("teacher", "student")
    logits = {role: generator.normal(0, 1.5, (count, total)) + 3 * skill * np.eye(total)[labels]
              for role, skill in zip(roles, (1.5, 0.7, 1.0))}
    history, elapsed = [], 0.0
    for role in roles:
        for epoch in (1, 2, 3):
            elapsed += 10 + 2 + 1
            history.append({"role": role, "epoch": epoch, "accuracy": 0.5 + epoch / 10, "loss": 1 / epoch,
                            "train_loss": 2 / epoch, "seconds": 10.0, "elapsed": elapsed})
    result = {role: {"model": f"{role}_net{suffix}", "params": 1234567, "validation_accuracy": 0.8}
              | {("test_" if key in ("accuracy", "macro_f1", "correct", "total") else "") + key: value
                 for key, value in scores(logits[role], labels).items()} for role in roles}
    config = {"dataset": f"/home/somebody/data/my {name}", "size": 40, "epochs": 3, "temperature": 4.0,
              "kd_weight": 0.5, "seed": 0, "augment": f"crop{suffix}", f"a_setting{suffix}": f"its value{suffix}"}
    out.mkdir()
    (out / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (out / "result.json").write_text(json.dumps({**result, "config": config, "seconds": 200.0,
                                                 "images_per_second": 31.4, "commit": f"c{suffix}",
                                                 "environment": {f"cpu{suffix}": f"fast{suffix}"}}))
    page.write_report(out, logits, make_data(classes, labels), lambda i: f"/home/somebody/photos/{name} & {i}.jpg",
                      Views(0, 40, AUGMENTATIONS["crop"], count=views), epochs=30)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", ("healthy", HOSTILE, "a_rather_long_name_of_a_class"))


@pytest.fixture(scope="module")
def text(run) -> str:
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def parsed(text) -> Parsed:
    return Parsed(text)


def test_nothing_comes_from_elsewhere_and_every_picture_decodes(text, parsed):
    assert text.startswith("<!DOCTYPE html>") and "<script" not in text and "url(" not in text and "@import" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert not re.findall(r"https?:", text)
    kinds = {"svg": 0, "jpeg": 0}
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert str(attributes[name]).startswith("data:")
        if tag in ("img", "source"):
            address = str(attributes.get("src") or attributes["srcset"])
            kind, data = re.fullmatch(r"data:image/(svg|jpeg)(?:\+xml)?;base64,(.*)", address).groups()  # type: ignore
            content = base64.b64decode(data, validate=True)
            kinds[kind] += 1
            if kind == "svg":
                root = ElementTree.fromstring(content)
                assert root.tag == "{http://www.w3.org/2000/svg}svg" and b"<image" not in content
                assert not re.findall(rb'href="(?!#)', content)  # nor does a drawing ask for anything
            else:
                assert Image.open(io.BytesIO(content)).size == (40, 40)
        if tag == "img":
            assert attributes["alt"] and attributes["width"] and attributes["height"]
    assert kinds["svg"] == 2 * (3 + 3)  # light and dark: three curves, three reliability diagrams
    cards = len(parsed.errors())
    assert kinds["jpeg"] == 4 * 6 + cards and cards > 3


def test_the_table_is_the_result(run, parsed):
    result = json.loads((run / "result.json").read_text())
    head, *rows, last = parsed.tables[0]
    assert head == ["model", "test accuracy", "macro-F1", "parameters"]
    assert rows == [[f"{role} {row['model']}",
                     f"{100 * row['test_accuracy']:.1f} % {row['test_correct']}/{row['test_total']}",
                     f"{row['test_macro_f1']:.3f}", f"{row['params']:,}"]
                    for role, row in ((role, result[role]) for role in ("teacher", "control", "student"))]
    gain = result["student"]["test_correct"] - result["control"]["test_correct"]
    assert last[1] == f"{100 * gain / 60:+.1f} points {gain:+d} images".replace("-", "−")
    for table, role in zip(parsed.tables[1:4], ("teacher", "control", "student"), strict=True):
        assert [[int(cell) for cell in line[1:]] for line in table[1:]] == result[role]["confusion"]


def test_gain_and_headroom_are_said_in_the_words_of_the_console(run, text, parsed):
    result, content = json.loads((run / "result.json").read_text()), read_predictions(run / "predictions.npz")
    only_student = int((content.correct("student") & ~content.correct("control")).sum())
    only_control = int((content.correct("control") & ~content.correct("student")).sum())
    images, p = only_student - only_control, mcnemar_p(only_student, only_control)
    assert images == result["student"]["test_correct"] - result["control"]["test_correct"]
    paired = {"gain": images / 60, "images": images, "only_first": only_student, "only_second": only_control, "p": p}
    for line in gain_lines(result, paired):
        assert line in parsed.paragraphs
    headroom = result["teacher"]["test_correct"] - result["control"]["test_correct"]
    assert f"student − control, {images:+d} of 60 images, p = {p:.2g}" in text
    assert f"teacher − control, {headroom:+d} of 60 images" in text
    assert any(paragraph.startswith(f"{only_student} test images only the student has right, {only_control} only")
               for paragraph in parsed.paragraphs)
    assert "gift" not in text


@pytest.mark.parametrize("method, tempered", [("kd", True), ("dkd", True), ("hard", False), ("rkd", False)])
def test_the_temperature_is_shown_where_the_method_reads_it(run, monkeypatch, method, tempered):
    monkeypatch.setattr(plots, "draw_plot", lambda *_, **__: NO_PLOT)     # no part of it
    result = json.loads((run / "result.json").read_text())
    result["config"]["method"] = method
    text = page.render(result, [], read_predictions(run / "predictions.npz"))
    for shown in ("T = 4, λ = 0.5", "as it teaches or learns (T = 4)", "T=4</th>"):
        assert (shown in text) == tempered, shown
    assert "λ = 0.5" in text and "as it predicts (T = 1)" in text and "T=1</th>" in text


def test_names_from_outside_are_text(text, parsed):
    assert HOSTILE not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert parsed.tables[1][2][0] == f"2 {HOSTILE}"
    assert "somebody" not in text  # the end of a path finds the picture; the rest is nobody's business


@pytest.mark.parametrize("classes", [3, 20])
def test_no_name_becomes_markup_wherever_it_stands(tmp_path, monkeypatch, classes):
    """Every string of the run's files is hostile: classes, test samples, models, settings, machine, commit."""
    monkeypatch.setattr(plots, "draw_plot", lambda *_, **__: NO_PLOT)  # roles are all that a plot names
    out = make_run(tmp_path / "run", tuple(f"{i}{BREAKOUT}" for i in range(classes)), name=BREAKOUT, suffix=BREAKOUT)
    text = (out / "report.html").read_text()
    parsed = Parsed(text)
    assert "<img src=x" not in text
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag != "img" or str(attributes["src"]).startswith("data:")
    # as text it is all there: in cells, headings, paragraphs and descriptions of pictures
    cells = [cell for table in parsed.tables for row in table for cell in row]
    for expected in (f"student student_net{BREAKOUT}", f"a_setting{BREAKOUT}", f"its value{BREAKOUT}", f"cpu{BREAKOUT}",
                     f"fast{BREAKOUT}", f"c{BREAKOUT}", f"0{BREAKOUT}"):
        assert expected in cells
    assert any(BREAKOUT in paragraph for paragraph in parsed.paragraphs)
    descriptions = [str(attributes["alt"]) for tag, attributes in parsed.tags if tag == "img"]
    assert sum(BREAKOUT in description for description in descriptions) > 24


def test_a_name_that_the_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        page.environment().from_string("{{ nothing }}").render()


def test_the_errors_are_those_of_the_logits(run, text, parsed):
    content = read_predictions(run / "predictions.npz")
    labels, teacher, student = content.labels, content.logits["teacher"], content.logits["student"]
    right = [(logits.argmax(1) == labels) for logits in (teacher, student)]
    expected = []
    for chosen, logits in ((right[0] & ~right[1], student), (~right[0] & right[1], teacher),
                           (~right[0] & ~right[1], student)):
        numbers = np.flatnonzero(chosen)
        confidence = torch.softmax(torch.from_numpy(logits).double(), 1).amax(1).numpy()[numbers]
        expected.append((len(numbers), numbers[np.argsort(-confidence, kind="stable")][:page.SHOWN].tolist()))
    # together: where the two disagree, or both fail
    either = (teacher.argmax(1) != student.argmax(1)) | (~right[0] & ~right[1])
    assert sum(count for count, _ in expected) == either.sum() > 0
    assert [heading for heading in parsed.headings if " wrong" in heading] == [
        f"{title}: {count} of 60" for title, (count, _) in zip(
            ("The student is wrong, the teacher right", "The teacher is wrong, the student right", "Both are wrong"),
            expected)]
    cards = parsed.errors()
    assert cards == [number for _, numbers in expected for number in numbers] == content.shown.tolist()
    assert [int(picture.mean()) for picture in content.pictures] == cards  # each card has its own picture
    first, table = cards[0], parsed.tables[4]
    assert table[0][1:] == ["teacher", "student"] and table[1] == ["%", "T=1", "T=4", "T=1", "T=4"]
    assert table[2][0] == content.classes[labels[first]]
    for line in table[2:]:
        probabilities = [torch.softmax(torch.from_numpy(logits[first]) / t, 0)[content.classes.index(line[0])].item()
                         for logits in (teacher, student) for t in (1, 4)]
        assert line[1:] == [f"{100 * p:.0f}" for p in probabilities]


def test_a_run_without_errors_shows_none(run, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_plot", lambda *_, **__: NO_PLOT)
    content = read_predictions(run / "predictions.npz")
    perfect = {role: np.eye(3, dtype=np.float32)[content.labels] for role in ("teacher", "student")}
    page.save_predictions(tmp_path, perfect, make_data(tuple(content.classes), content.labels), str,
                          Views(0, 40, AUGMENTATIONS["none"], count=1), epochs=1)
    saved = read_predictions(tmp_path / "predictions.npz")
    assert len(saved.pictures) == 0 and [group.total for group in page.error_groups(saved, 4.0)] == [0, 0, 0]
    parsed = Parsed(page.render(json.loads((run / "result.json").read_text()), [], saved))
    assert [heading for heading in parsed.headings if " wrong" in heading][-1] == "Both are wrong: 0 of 60"
    assert not parsed.errors()


def test_the_parts_of_the_time_sum_to_the_whole():
    history = [{"role": role, "seconds": 10.0, "elapsed": elapsed}
               for role, elapsed in (("teacher", 20.0), ("teacher", 33.0), ("student", 60.0), ("student", 75.0))]
    parts = page.time_parts(history, 100.0)
    assert [part.role for part in parts] == ["teacher", "student", "other", "other"]
    seconds = [part.seconds for part in parts]
    assert seconds == [20.0, 20.0, (33 - 20 - 10) + (75 - 60 - 10), 52.0] and sum(seconds) == 100


def test_the_dark_plots_are_those_that_the_dark_palette_would_draw(monkeypatch):
    """But for the names of marks and clips, which are made from what they show."""
    history = [{"role": role, "epoch": epoch, "accuracy": 0.3 + 0.2 * epoch, "loss": 1 / epoch}
               for role in ("teacher", "control", "student") for epoch in (1, 2, 3)]
    bins = [Bin(0.05 + 0.1 * i, 0.05 + 0.1 * i, 0.1 * i, 3 * i) for i in range(10)]

    def dark() -> list[str]:
        drawn = [plots.curves(history, "accuracy"), plots.curves(history, "loss"), plots.reliability(bins, "student")]
        svgs = [base64.b64decode(plot.dark.partition(",")[2]).decode() for plot in drawn]
        return [re.sub(r"\b[mp][0-9a-f]{10}\b", "name", svg) for svg in svgs]

    recoloured, draw_plot = dark(), plots.draw_plot
    monkeypatch.setattr(plots, "draw_plot", lambda draw, width=3.9, height=2.75: draw_plot(draw, width, height, True))
    assert recoloured == dark()
    assert plots.DARK["student"] in recoloured[0] and plots.LIGHT["student"] not in recoloured[0]
    assert len(set(plots.LIGHT.values())) == len(plots.LIGHT)


def test_many_classes_are_a_picture_and_no_control_is_said(tmp_path):
    names = tuple(f"class_{i}_{HOSTILE}_{'x' * 30}" for i in range(20))
    out = make_run(tmp_path / "run", names, count=300, control=False, views=1)
    text = (out / "report.html").read_text()
    parsed = Parsed(text)
    assert "Confusion matrix of the student over 20 classes." in text and "Without <code>--control</code>" in text
    assert parsed.tables[0][-1][0].startswith("student ") and text.count("taken for") >= 5 and HOSTILE not in text
    if (path := browser.find()) is not None:
        with browser.Browser(path) as window:
            window.open(out / "report.html", 390, "light")
            assert window.value("document.documentElement.scrollWidth <= innerWidth")


def test_the_sheet_has_the_very_views_of_training():
    split = Split(noise(9, 40), np.arange(9) % 3)  # type: ignore[arg-type]
    views = Views(seed=3, size=32, augmentation=AUGMENTATIONS["crop"], count=2)
    pictures, labels = page.sample_views(split, views, 30)
    assert pictures.shape == (9, 2, 32, 32, 3) and labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    by_class = np.argsort(split.labels, kind="stable")
    for view in range(2):
        expected = load_views(split.frames, by_class, view, views, torch.device("cpu"))
        assert np.array_equal(pictures[:, view], expected.permute(0, 2, 3, 1).numpy())
    fresh = Views(seed=3, size=32, augmentation=AUGMENTATIONS["crop"], count=0)
    assert page.sample_views(split, fresh, 30)[0].shape[:2] == (4, 6)
    assert page.sample_views(split, fresh, 2)[0].shape[:2] == (9, 2)


def test_the_command_draws_the_same_page_again(run, text, capsys):
    (run / "report.html").unlink()
    page.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == text
    with pytest.raises(BadInput, match="x: No such file"):
        page.main([str(run / "x")])


@pytest.mark.parametrize("content", [None, "{"])
def test_metrics_that_are_none_are_named(run, tmp_path, content):
    for name in ("result.json", "predictions.npz"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    if content:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(BadInput, match="metrics.jsonl: not readable .* give the folder of a run that has ended"):
        page.redraw(tmp_path)


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
    result = train.main(train.dataclasses.replace(tiny, resume=True))
    assert (out / "result.json").read_bytes() == before and json.loads(before) == result
    assert Parsed((out / "report.html").read_text()).tables[0][2][1] == (
        f"{100 * result['student']['test_accuracy']:.1f} % {result['student']['test_correct']}/12")
    content: Predictions = read_predictions(out / "predictions.npz")
    assert scores(content.logits["student"], content.labels)["confusion"] == result["student"]["confusion"]
    assert scores(content.logits["teacher"], content.labels)["loss"] == result["teacher"]["loss"]
    assert content.names[5].endswith("test/plain/1.png") and content.classes == ["blob", "plain", "stripes"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_sideways_scrolling_requests_or_complaints(run, scheme):
    path = browser.find()
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(browser.NAMES)}")
    with browser.Browser(path) as window:
        for width in (390, 1280):
            window.open(run / "report.html", width, scheme)
            assert window.value("innerWidth") == width
            assert window.value("document.documentElement.scrollWidth <= innerWidth")
            assert window.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            requests = [address for address in window.requests() if not address.startswith("data:")]
            assert requests == [(run / "report.html").as_uri()] and window.complaints() == []
            light = window.value("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 248)"
            assert light == (scheme == "light")
            drawn = window.value("document.querySelector('picture img').currentSrc == "
                                 "document.querySelector('picture source').srcset")
            assert drawn == (scheme == "dark")
