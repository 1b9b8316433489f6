"""The page of a run: what it shows against what the run's files hold, parsed as HTML and looked at by a browser."""

import base64
import io
import json
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import train
from kd import BadInput
from kd.tools import page
from kd.views import SPECS, load_views
from kd.scores import calibration_error, log_softmax, scores
from tests.helpers import browser

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "img", "source", "wbr", "br"}
HOSTILE = "<script>alert(1)</script>"


class Parsed(HTMLParser):
    """Every tag with its attributes, every table as rows of cells, every heading; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
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


def make_run(out: Path, classes: tuple[str, ...], count: int = 60, control: bool = True, views: int = 6) -> Path:
    """A run's files, without the training: random logits that are right more often than not."""
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
    result = {role: {"model": f"{role}_net", "params": 1234567, "validation_accuracy": 0.8}
              | {("test_" if key in ("accuracy", "macro_f1", "correct", "total") else "") + key: value
                 for key, value in scores(logits[role], labels).items()} for role in roles}
    config = {"dataset": f"/home/somebody/data/my {HOSTILE}", "size": 40, "epochs": 3, "temperature": 4.0,
              "kd_weight": 0.5, "seed": 0, "augment": "crop"}
    out.mkdir()
    (out / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (out / "result.json").write_text(json.dumps({**result, "config": config, "seconds": 200.0,
                                                 "images_per_second": 31.4, "environment": {}, "commit": "c"}))

    def read(numbers: np.ndarray) -> np.ndarray:
        return np.stack([np.full((46, 46, 3), number, np.uint8) for number in numbers])

    page.keep(out, logits, labels, classes, lambda i: f"/home/somebody/photos/{HOSTILE} & {i}.jpg", read, 40,
              generator.integers(0, 255, (4, views, 40, 40, 3), np.uint8), np.arange(4) % total)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = make_run(tmp_path_factory.mktemp("page") / "run", ("healthy", HOSTILE, "a_rather_long_name_of_a_class"))
    page.write(out)
    return out


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
    cards = sum("data-sample" in attributes for _, attributes in parsed.tags)
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


def test_names_from_outside_are_text(text, parsed):
    assert HOSTILE not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert parsed.tables[1][2][0] == f"2 {HOSTILE}"
    assert "somebody" not in text  # the end of a path finds the picture; the rest is nobody's business


def test_the_errors_are_those_of_the_logits(run, text, parsed):
    kept = page.read_predictions(run / "predictions.npz")
    labels, teacher, student = kept["labels"], kept["teacher"], kept["student"]
    right = [(logits.argmax(1) == labels) for logits in (teacher, student)]
    expected = []
    for chosen, by in ((right[0] & ~right[1], student), (~right[0] & right[1], teacher),
                       (~right[0] & ~right[1], student)):
        numbers = np.flatnonzero(chosen)
        sure = torch.softmax(torch.from_numpy(by).double(), 1).amax(1).numpy()[numbers]
        expected.append((len(numbers), numbers[np.argsort(-sure, kind="stable")][:page.SHOWN].tolist()))
    # together: where the two disagree, or both fail
    either = (teacher.argmax(1) != student.argmax(1)) | (~right[0] & ~right[1])
    assert sum(count for count, _ in expected) == either.sum() > 0
    assert [heading for heading in parsed.headings if " wrong" in heading] == [
        f"{title}: {count} of 60" for title, (count, _) in zip(
            ("The student is wrong, the teacher right", "The teacher is wrong, the student right", "Both are wrong"),
            expected)]
    cards = [int(str(attributes["data-sample"])) for tag, attributes in parsed.tags if "data-sample" in attributes]
    assert cards == [number for _, numbers in expected for number in numbers] == kept["shown"].tolist()
    assert [int(picture.mean()) for picture in kept["pictures"]] == cards  # each card has its own picture
    first, table = cards[0], parsed.tables[4]
    assert table[0][1:] == ["teacher", "student"] and table[1] == ["%", "T=1", "T=4", "T=1", "T=4"]
    names = kept["classes"].tolist()
    assert table[2][0] == names[labels[first]]
    for line in table[2:]:
        probabilities = [torch.softmax(torch.from_numpy(logits[first]) / t, 0)[names.index(line[0])].item()
                         for logits in (teacher, student) for t in (1, 4)]
        assert line[1:] == [f"{100 * p:.0f}" for p in probabilities]


def test_a_run_without_errors_shows_none(run, tmp_path):
    kept = page.read_predictions(run / "predictions.npz")
    perfect = {role: np.eye(3, dtype=np.float32)[kept["labels"]] for role in ("teacher", "student")}
    page.keep(tmp_path, perfect, kept["labels"], tuple(kept["classes"]), str,
              lambda numbers: np.zeros((len(numbers), 46, 46, 3), np.uint8), 40, kept["views"], kept["view_labels"])
    parsed = Parsed(page.errors(page.read_predictions(tmp_path / "predictions.npz"), 4.0))
    assert parsed.headings[-1] == "Both are wrong: 0 of 60" and not parsed.tables


def test_the_bins_of_the_diagram_are_those_of_the_calibration_error(run):
    kept = page.read_predictions(run / "predictions.npz")
    bins = page.reliability(kept["student"], kept["labels"])
    error = sum(count * abs(right - sure) for sure, right, count in bins) / 60
    confidence = np.exp(log_softmax(kept["student"]).max(1))
    assert error == pytest.approx(calibration_error(confidence, kept["student"].argmax(1) == kept["labels"]))
    assert sum(count for _, _, count in bins) == 60


def test_time_and_chance_by_hand():
    history = [{"role": role, "seconds": 10.0, "elapsed": elapsed}
               for role, elapsed in (("teacher", 20.0), ("teacher", 33.0), ("student", 60.0), ("student", 75.0))]
    parts = dict(page.time_parts(history, 100.0))
    assert list(parts.values()) == [20.0, 20.0, (33 - 20 - 10) + (75 - 60 - 10), 52.0] and sum(parts.values()) == 100
    assert page.sign_test(0, 5) == 2 / 32 and page.sign_test(5, 0) == 2 / 32 and page.sign_test(4, 4) == 1
    assert page.sign_test(1, 6) == 2 * (1 + 7) / 128 and page.sign_test(0, 0) == 1


def test_many_classes_are_a_picture_and_no_control_is_said(tmp_path):
    names = tuple(f"class_{i}_{HOSTILE}_{'x' * 30}" for i in range(20))
    out = make_run(tmp_path / "run", names, count=300, control=False, views=1)
    text = page.write(out).read_text()
    parsed = Parsed(text)
    assert "Confusion matrix of the student over 20 classes." in text and "Without <code>--control</code>" in text
    assert parsed.tables[0][-1][0].startswith("student ") and text.count("taken for") >= 5 and HOSTILE not in text
    if (path := browser.find()) is not None:
        with browser.Browser(path) as window:
            window.open(out / "report.html", 390, "light")
            assert window.value("document.documentElement.scrollWidth <= innerWidth")


def test_the_sheet_has_the_very_views_of_training():
    frames = np.random.default_rng(0).integers(0, 255, (9, 40, 40, 3), np.uint8)
    labels = np.arange(9) % 3
    setting: dict[str, Any] = dict(seed=3, size=32, spec=SPECS["crop"], device=torch.device("cpu"))
    views, shown = page.view_sheet(lambda numbers: frames[numbers], labels, 2, **setting)
    assert views.shape == (9, 2, 32, 32, 3) and shown.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for view in range(2):
        expected = load_views(lambda numbers: frames[numbers], 9, np.argsort(labels, kind="stable"), view=view,
                              **setting)
        assert np.array_equal(views[:, view], expected.permute(0, 2, 3, 1).numpy())
    assert page.view_sheet(lambda numbers: frames[numbers], labels, 30, **setting)[0].shape[:2] == (4, 6)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut", "pickle", "shapes"])
def test_predictions_that_are_none_are_refused_and_nothing_in_them_runs(run, tmp_path, content):
    path, buffer = tmp_path / "predictions.npz", io.BytesIO()
    if content == "pickle":
        np.savez(buffer, teacher=np.array([{"an": "object"}], object))
        content = buffer.getvalue()
    elif content == "shapes":
        kept = page.read_predictions(run / "predictions.npz")
        np.savez(buffer, **{**kept, "labels": kept["labels"][:-1]})  # type: ignore[arg-type]
        content = buffer.getvalue()
    path.write_bytes(content)
    with pytest.raises(BadInput, match="predictions.npz: not readable"):
        page.read_predictions(path)
    path.unlink()
    with pytest.raises(BadInput, match="predictions.npz: no such file"):
        page.read_predictions(path)


def test_the_command_draws_the_same_page_again(run, text):
    done = subprocess.run([sys.executable, "-m", "kd", "page", str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html"), done.stderr
    assert (run / "report.html").read_text() == text
    done = subprocess.run([sys.executable, "-m", "kd", "page", str(run / "x")], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("kd page: error: ")


def test_a_run_ends_with_its_page_and_a_fault_in_drawing_costs_the_page_alone(tiny, monkeypatch):
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
    kept = page.read_predictions(out / "predictions.npz")
    assert scores(kept["student"], kept["labels"])["confusion"] == result["student"]["confusion"]
    assert scores(kept["teacher"], kept["labels"])["loss"] == result["teacher"]["loss"]
    assert kept["names"][5].endswith("test/plain/1.png") and kept["classes"].tolist() == ["blob", "plain", "stripes"]


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
            assert window.value("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
            asked = [address for address in window.requests() if not address.startswith("data:")]
            assert asked == [(run / "report.html").as_uri()] and window.complaints() == []
            light = window.value("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 248)"
            assert light == (scheme == "light")
            drawn = window.value("document.querySelector('picture img').currentSrc == "
                                 "document.querySelector('picture source').srcset")
            assert drawn == (scheme == "dark")
