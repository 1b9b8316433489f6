"""kd/tools/card.py: the model card, read by the parser of the Hub's client."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from kd.tools import card, predict

ROW = {"test_accuracy": 0.75, "test_correct": 96, "test_total": 128, "test_macro_f1": 0.7421}
ROWS = {"teacher": {**ROW, "test_accuracy": 0.96875, "test_correct": 124}, "control": ROW,
        "student": {**ROW, "test_accuracy": 0.8125, "test_correct": 104}}
SETTINGS = {"dataset": "beans", "teacher": "resnet50", "teacher_weights": "imagenet", "teacher_epochs": 8,
            "student": "mobilenetv2_100", "student_weights": "none", "kd_weight": 0.5, "method": "kd", "labels": 0,
            "push_to_hub": ""}


def render(role: str, rows: dict = ROWS, **settings: Any) -> Any:
    """The card, read as the Hub's client reads it."""
    text = card.render_card(role, rows, SETTINGS | settings, "python train.py --seed 3")
    parsed = ModelCard(text)
    assert parsed.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    assert "```\npython train.py --seed 3\n```" in text
    return parsed


def odd_pictures(folder: Path) -> list[Path]:
    """A photograph that was taken upright, a PNG with transparent parts, and a palette with a transparent colour."""
    generator = np.random.default_rng(0)
    pixels = np.kron(generator.integers(0, 256, (6, 9, 3)), np.ones((9, 9, 1))).astype(np.uint8)     # 81 x 54
    exif = Image.Exif()
    exif[0x0112] = 6    # the orientation: to be turned by 90 degrees
    paths = [folder / name for name in ("portrait.jpg", "alpha.png", "palette.png")]
    Image.fromarray(pixels).save(paths[0], exif=exif, quality=95)
    alpha = np.linspace(0, 255, 81).astype(np.uint8)[None, :, None].repeat(54, 0)
    Image.fromarray(np.concatenate([pixels // 4, alpha], 2)).save(paths[1])
    palette = Image.fromarray(pixels // 4).quantize(4)
    palette.save(paths[2], transparency=int(np.asarray(palette)[27, 40]))
    return paths


def test_the_code_of_the_card_gives_the_probabilities_of_kd_predict(trained, tmp_path):
    """Also for pictures that have to be turned or to be laid over white. The code runs as it stands in README.md."""
    folder = f"{trained[0].out}/student"
    code = (Path(folder) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("hf-hub:OWNER/NAME", f"local-dir:{folder}")
    assert code.count("local-dir:") == 2 and code.count('"photo.jpg"') == 1
    assert '{"crop_mode": "center"}' in code    # timm would squash, where a model says so
    pictures = odd_pictures(tmp_path)
    given = predict.main([folder, *map(str, pictures), "--json", "--device", "cpu", "--amp", "off"])
    for path, row in zip(pictures, given, strict=True):
        scope: dict[str, Any] = {}
        exec(code.replace('"photo.jpg"', repr(str(path))), scope)
        expected = {entry["class"]: entry["probability"] for entry in row["top"]}
        found = dict(zip(scope["model"].pretrained_cfg["label_names"], scope["probabilities"].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-4), path.name

        # the pictures are odd enough: without the two steps the answer would be another
        plain = scope["transform"](Image.open(path).convert("RGB"))
        right = scope["transform"](scope["image"].convert("RGB"))
        assert (plain - right).abs().max() > 0.1, path.name


def test_a_card_has_the_scores_of_its_model_and_those_of_all_beside_it():
    for role, network, accuracy in (("teacher", "resnet50", 0.96875), ("control", "mobilenetv2_100", 0.75),
                                    ("student", "mobilenetv2_100", 0.8125)):
        parsed = render(role, push_to_hub="someone/student")
        data = parsed.data
        assert (data.library_name, data.pipeline_tag, data.model_name) == ("timm", "image-classification", network)
        assert data.datasets == ["AI-Lab-Makerere/beans"]
        assert [(each.metric_type, each.metric_value, each.dataset_type, each.dataset_split)
                for each in data.eval_results] == [("accuracy", accuracy, "AI-Lab-Makerere/beans", "test"),
                                                   ("f1", 0.7421, "AI-Lab-Makerere/beans", "test")]
        for text in (f"# {network} on beans\n", "| teacher | `resnet50` | 96.9 % (124/128) | 0.742 |",
                     "| control | `mobilenetv2_100` | 75.0 % (96/128) | 0.742 |",
                     "| student | `mobilenetv2_100` | 81.2 % (104/128) | 0.742 |", "used once",
                     'timm.create_model("hf-hub:someone/student", pretrained=True)'):
            assert text in parsed.content, text


def test_a_card_that_is_written_during_training_has_validation_scores_or_none():
    early = render("student", {"student": {"accuracy": 0.5, "correct": 6, "total": 12, "macro_f1": 0.4}})
    assert {(each.metric_value, each.dataset_split) for each in early.data.eval_results} == {
        (0.5, "validation"), (0.4, "validation")}
    assert "accuracy on validation" in early.content and "Training was not over by then." in early.content
    assert render("teacher", {}).data.eval_results is None


@pytest.mark.parametrize("role, settings, words", [
    ("student", {}, "a distillation by `kd`, λ = 0.5: it learned from its teacher `resnet50` and from the labels."),
    ("student", {"kd_weight": 1.0}, "λ = 1: it learned from its teacher `resnet50` only, and read no label."),
    ("student", {"kd_weight": 1.0, "method": "dkd"}, "from its teacher `resnet50` and from the labels."),
    ("student", {"labels": 60}, "`resnet50` and from 60 of the training labels."),
    ("student", {"kd_weight": 0.0}, "The student's recipe without a teacher: it learned from the labels only."),
    ("control", {"labels": 60}, "without a teacher: it learned from 60 of the training labels only."),
    ("teacher", {}, "The teacher of a distillation, which learned from the labels only."),
    ("teacher", {"teacher_epochs": 0}, "The teacher of a distillation, used as it was loaded.")])
def test_a_card_says_what_its_model_learned_from(role, settings, words):
    assert f"{words}\n" in render(role, **settings).content


@pytest.mark.parametrize("name, base, shown", [
    ("resnet50", "timm/resnet50.a1_in1k", "resnet50"),
    ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
    ("hf-hub:timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k"),
    ("hf-hub:someone/insects@main", "someone/insects", "hf-hub:someone/insects@main"),
    ("local-dir:/home/me/insects", None, "local-dir:insects")])
def test_the_base_model_is_what_the_model_started_from(name, base, shown):
    teacher = render("teacher", teacher=name)
    assert teacher.data.base_model == base and f"# {shown} on beans" in teacher.content
    assert render("teacher", teacher=name, teacher_weights="none").data.base_model is None
    assert render("student", teacher=name).data.base_model is None     # the Hub has no relation for a teacher
    assert render("control", student=name, student_weights="imagenet").data.base_model == base


def test_the_card_of_data_on_this_machine_names_no_path_and_no_stranger(tmp_path):
    student = render("student", dataset=str(tmp_path))
    assert str(tmp_path.parent) not in student.content and student.data.datasets is None
    assert {each["dataset"]["type"] for each in student.data.to_dict()["model-index"][0]["results"]} == {"imagefolder"}


def test_a_run_ends_with_cards_that_have_its_test_scores(trained):
    config, result = trained
    for role in ("teacher", "student"):
        parsed: Any = ModelCard((Path(config.out) / role / "README.md").read_text())
        assert [each.metric_value for each in parsed.data.eval_results] == [
            result[role]["test_accuracy"], result[role]["test_macro_f1"]]
        assert "```\npython train.py --recipe tutorial --dataset photos" in parsed.content
