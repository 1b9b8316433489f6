"""kd/tools/card.py: the model card, read by the parser of the Hub's client."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import train
from kd import cli
from kd.tools import card, predict

ROW = {"test_accuracy": 0.75, "test_correct": 96, "test_total": 128, "test_macro_f1": 0.7421}
ROWS = {"teacher": {**ROW, "test_accuracy": 0.96875, "test_correct": 124}, "control": ROW,
        "student": {**ROW, "test_accuracy": 0.8125, "test_correct": 104}}


def parsed(text: str) -> Any:
    """Read as the Hub's client reads it, and held to what its validator is known to ask for."""
    parsed_card = ModelCard(text)
    meta = yaml.safe_load(text.split("---\n")[1])
    assert parsed_card.data.to_dict() == meta
    assert meta["license"] == "apache-2.0" and meta["library_name"] == "timm"
    assert meta["pipeline_tag"] == "image-classification" and meta["metrics"] == ["accuracy", "f1"]
    for model in meta.get("model-index", []):
        for result in model["results"]:
            assert result["task"]["type"] == "image-classification"
            assert isinstance(result["dataset"]["type"], str) and isinstance(result["dataset"]["name"], str)
            assert all(isinstance(metric["value"], float) for metric in result["metrics"])
    assert meta.get("base_model_relation") in (None, "adapter", "finetune", "merge", "quantized")
    return parsed_card


def odd_pictures(folder: Path) -> dict[str, Path]:
    """A photograph that was taken upright, a PNG with transparent parts, and a palette with a transparent colour."""
    generator = np.random.default_rng(0)
    pixels = np.kron(generator.integers(0, 256, (6, 9, 3)), np.ones((9, 9, 1))).astype(np.uint8)     # 81 x 54
    exif = Image.Exif()
    exif[0x0112] = 6    # the orientation: to be turned by 90 degrees
    paths = {name: folder / name for name in ("portrait.jpg", "alpha.png", "palette.png")}
    Image.fromarray(pixels).save(paths["portrait.jpg"], exif=exif, quality=95)
    alpha = np.linspace(0, 255, 81).astype(np.uint8)[None, :, None].repeat(54, 0)
    Image.fromarray(np.concatenate([pixels // 4, alpha], 2)).save(paths["alpha.png"])
    palette = Image.fromarray(pixels // 4).quantize(4)
    palette.save(paths["palette.png"], transparency=int(np.asarray(palette)[27, 40]))
    return paths


def test_the_code_of_the_card_gives_the_probabilities_of_kd_predict(trained, tmp_path):
    """Also for pictures that have to be turned or to be laid over white. The code runs as it stands in README.md."""
    config, _ = trained
    folder = f"{config.out}/student"
    code = (Path(folder) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("hf-hub:OWNER/NAME", f"local-dir:{folder}").removesuffix("\n")
    assert code.count("local-dir:") == 2 and code.count('"photo.jpg"') == 1
    pictures = odd_pictures(tmp_path)
    given = predict.main([folder, *map(str, pictures.values()), "--json", "--device", "cpu", "--amp", "off"])
    for path, row in zip(pictures.values(), given, strict=True):
        scope: dict[str, Any] = {}
        exec(code.replace('"photo.jpg"', repr(str(path))), scope)
        expected = {entry["class"]: entry["probability"] for entry in row["top"]}
        found = dict(zip(scope["model"].pretrained_cfg["label_names"], scope["probabilities"].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-4), path.name

        # the pictures are odd enough: without the two steps the answer would be another
        plain = scope["transform"](Image.open(path).convert("RGB"))
        right = scope["transform"](scope["image"].convert("RGB"))
        assert (plain - right).abs().max() > 0.1, path.name


def test_the_card_s_crop_is_central_also_where_timm_would_squash(trained, tmp_path):
    config, _ = trained
    code = (Path(config.out) / "student" / "README.md").read_text().split("```python\n")[1]
    line = next(line for line in code.splitlines() if line.startswith("transform = "))
    scope: dict[str, Any] = {"timm": timm, "model": timm.create_model("test_resnet", pretrained_cfg_overlay={
        "crop_mode": "squash"})}
    exec(line, scope)
    assert "CenterCrop" in str(scope["transform"]) and "Resize(size=[" not in str(scope["transform"])


def test_the_card_of_each_role_says_what_it_is_and_what_it_comes_from():
    config = train.Config(recipe="tutorial", push_to_hub="someone/student", control=True, seed=3, kd_weight=0.7)
    student = parsed(train.model_card(config, "student", ROWS))
    assert student.data.base_model == "timm/resnet50.a1_in1k" and student.data.datasets == ["AI-Lab-Makerere/beans"]
    assert "base_model_relation" not in student.data.to_dict()
    assert [(each.metric_type, each.metric_value) for each in student.data.eval_results] == [
        ("accuracy", 0.8125), ("f1", 0.7421)]
    assert {(each.dataset_type, each.dataset_split) for each in student.data.eval_results} == {
        ("AI-Lab-Makerere/beans", "test")}
    for text in ("| teacher | `resnet50` | 96.9 % (124/128) | 0.742 |",
                 "| control | `mobilenetv2_100` | 75.0 % (96/128) | 0.742 |",
                 "| student | `mobilenetv2_100` | 81.2 % (104/128) | 0.742 |", "T = 5, λ = 0.7", "used once",
                 "\npython train.py --recipe tutorial --seed 3 --control --kd-weight 0.7\n",
                 'timm.create_model("hf-hub:someone/student", pretrained=True)', "local-dir:", "label_names",
                 "create_transform", "one is 0.78 points"):
        assert text in student.content, text
    teacher = parsed(train.model_card(config, "teacher", ROWS))
    assert teacher.data.base_model == "timm/resnet50.a1_in1k" and teacher.data.base_model_relation == "finetune"
    assert teacher.data.eval_results[0].metric_value == 0.96875 and "# resnet50 on beans" in teacher.content
    control = parsed(train.model_card(config, "control", ROWS))
    assert control.data.base_model is None and control.data.eval_results[0].metric_value == 0.75
    local_weights = dataclasses.replace(config, teacher_weights="weights/x.safetensors")
    assert parsed(train.model_card(local_weights, "student", ROWS)).data.base_model is None


@pytest.mark.parametrize("settings, words", [
    ({"kd_weight": 0.5}, "the student of a distillation: it learned from the labels and from its teacher."),
    ({"kd_weight": 1.0}, "the student of a distillation (λ = 1): it learned from its teacher only, and read no label."),
    ({"kd_weight": 1.0, "method": "dkd"}, "it learned from the labels and from its teacher."),
    ({"kd_weight": 0.0}, "the student's recipe without a teacher (λ = 0): it learned from the labels only.")])
def test_the_card_says_what_the_student_learned_from(settings, words):
    config = dataclasses.replace(train.Config(), **settings)
    assert f"{words}\n" in train.model_card(config, "student", ROWS)


def test_the_card_of_a_teacher_has_its_own_size_and_training():
    config = train.Config(size=96, teacher_size=224, teacher_epochs=0, labels=60, kd_weight=0.0)
    loaded = train.model_card(config, "teacher", ROWS)
    assert "the teacher of a distillation, used as it was loaded." in loaded and "central 224 × 224 pixels" in loaded
    assert "epoch by validation" not in loaded and "from its teacher" not in loaded
    assert "60 labels of the training split; whoever learns from labels knows only these pictures\n" in loaded
    tuned = train.model_card(dataclasses.replace(config, teacher_epochs=4, kd_weight=1.0), "teacher", ROWS)
    assert "it learned from the labels only" in tuned and "weights are those of the best epoch" in tuned
    assert "knows only these pictures, and the student learns the others from its teacher\n" in tuned
    assert "central 96 × 96 pixels" in train.model_card(config, "student", ROWS)


def test_the_card_knows_every_way_to_name_a_teacher():
    for name, base, text in (
            ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", "`timm/resnet50.a1_in1k`, from timm's pretrained"),
            ("hf-hub:timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", "from timm's pretrained weights"),
            ("hf-hub:someone/insects@main", "someone/insects", "teacher `hf-hub:someone/insects@main`, from its"),
            ("local-dir:insects", None, "teacher `local-dir:insects`, from its pretrained weights"),
            ("local-dir:/home/me/insects", None, "teacher `local-dir:insects`, from its pretrained weights")):
        config = train.Config(recipe="tutorial", teacher=name)
        for role in ("teacher", "student"):
            written = parsed(train.model_card(config, role, ROWS))
            assert written.data.base_model == base and text in written.content and "/home" not in written.content
        assert "--teacher " + name.replace("/home/me/", "") in written.content


def test_the_card_of_data_on_this_machine_names_no_path_and_no_stranger(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    config = train.Config(recipe="tutorial", dataset=str(folder), teacher_weights=str(tmp_path / "w.safetensors"),
                          out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), push_to_hub="a/b", device="cpu")
    student = parsed(train.model_card(config, "student", {}))  # nothing was scored yet
    assert str(tmp_path) not in student.content
    assert student.data.datasets is None and student.data.eval_results is None
    assert "\npython train.py --recipe tutorial --dataset photos --teacher-weights w.safetensors\n" in student.content
    config = dataclasses.replace(config, follow_links=True)     # without it, the command would be refused
    assert "--dataset photos --follow-links --teacher-weights" in train.model_card(config, "student", {})


def test_the_card_is_written_with_validation_scores_and_at_the_end_with_test_scores(tiny, monkeypatch):
    cards: list[str] = []
    render_card = card.render_card

    def recorded(*arguments) -> str:
        cards.append(render_card(*arguments))
        return cards[-1]

    monkeypatch.setattr(card, "render_card", recorded)
    config = dataclasses.replace(tiny, control=True)
    result = train.main(config)
    assert len(cards) >= 6
    # the teacher's first card already names the command of the whole run, not settings of its own fine-tuning
    command = cli.command(config, train.RECIPES, train.FREE_ON_RESUME - {"allow_weak_teacher"})
    assert all(f"```\n{command}\n```" in text for text in cards)
    for early in map(parsed, cards[:-3]):
        assert {each.dataset_split for each in early.data.eval_results} == {"validation"}
        assert "Scores on the validation split" in early.content and "Training was not over" in early.content
    for role in ("teacher", "control", "student"):
        last = parsed((Path(tiny.out) / role / "README.md").read_text())
        values = {each.metric_type: (each.metric_value, each.dataset_split) for each in last.data.eval_results}
        assert values == {"accuracy": (result[role]["test_accuracy"], "test"),
                          "f1": (result[role]["test_macro_f1"], "test")}
        for other in ("teacher", "control", "student"):
            assert f"({result[other]['test_correct']}/12)" in last.content
