"""kd/features.py: pooled features of timm's models, and a student that reuses its teacher's classifier."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import train
from kd import BadInput, features, models
from kd.fast.folding import for_inference
from kd.machine import runtime
from kd.features import ReusedHead, logits_and_features, merge_head, reuse_head, width
from kd.teacher import StoreOptions

CLASSES = ("a", "b", "c", "d")


def model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return models.create("student", name, CLASSES).eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext",
                                  "mobilenetv3_small_050", "mobilenetv2_050"])
def test_the_features_are_what_the_classifier_makes_logits_of(name):
    one, x = model(name), torch.randn(2, 3, 160 if "test" in name else 64, 160 if "test" in name else 64)
    with torch.no_grad():
        outputs = logits_and_features(one, x)
        logits, pooled = outputs[:, :4], outputs[:, 4:]
        assert pooled.shape[1] == width(one)
        torch.testing.assert_close(logits, one(x), rtol=1e-4, atol=1e-5)
        head = one.get_classifier()
        torch.testing.assert_close(pooled @ head.weight.T + head.bias, logits, rtol=1e-4, atol=1e-5)


def test_a_folded_teacher_has_the_same_features():
    one, x = model("test_resnet"), torch.randn(2, 3, 64, 64)
    folded, done = for_inference(one, 64)
    assert "folded" in done
    with torch.no_grad():
        torch.testing.assert_close(logits_and_features(folded, x), logits_and_features(one, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_a_model_without_one_linear_classifier_is_refused(name):
    with pytest.raises(BadInput, match=f"^--teacher {name}: has no pooled features for --method pkt"):
        features.refuse_without("teacher", timm.create_model(name, num_classes=4), "pkt", 224)


def test_logits_that_are_not_made_of_the_pooled_features_are_seen():
    one = model("test_resnet")
    plain = one.forward_head
    one.forward_head = lambda x, pre_logits=False: plain(x, pre_logits) * (2 if pre_logits else 1)
    with pytest.raises(BadInput, match="its logits are not a linear function of them"):
        features.refuse_without("student", one, "pkt", 64)
    one.fc = torch.nn.Linear(width(one), 4, bias=False)
    one.forward_head = plain
    with pytest.raises(BadInput, match="its logits are not a linear function of them"):
        features.refuse_without("student", one, "simkd", 64)


def test_a_method_on_features_refuses_such_a_model_before_it_trains(tiny):
    with pytest.raises(BadInput, match="^--student levit_128s: has no pooled features for --method simkd"):
        train.main(dataclasses.replace(tiny, method="simkd", student="levit_128s", size=224))


def test_at_weight_0_the_teacher_is_not_asked_for_features(tiny, monkeypatch):
    asked = []

    def recorded(folder: Path, topk: int, temperature: float, with_features: bool) -> StoreOptions:
        asked.append(with_features)
        return StoreOptions(folder, topk, temperature, with_features)

    monkeypatch.setattr(train, "StoreOptions", recorded)
    for weight in (0.0, 0.5):
        train.main(dataclasses.replace(tiny, epochs=1, method="pkt", kd_weight=weight, out=f"{tiny.out}-{weight}"))
    assert asked == [False, True]


def test_the_merged_head_gives_the_same_logits_and_is_what_timm_builds():
    student, teacher, x = model("test_efficientnet"), model("test_resnet", seed=1), torch.randn(3, 3, 64, 64)
    plain = models.parameters(student)
    student.pretrained_cfg["classifier"] = None     # as of a model that was registered without a record
    reuse_head(student, teacher)
    head = student.get_classifier()
    assert isinstance(head, ReusedHead) and head.projector.weight.shape == (width(teacher), 256)
    assert torch.equal(head.classifier.weight, teacher.get_classifier().weight)
    assert not head.classifier.weight.requires_grad and head.projector.weight.requires_grad
    with torch.no_grad():
        outputs, before = logits_and_features(student, x), student(x)
        torch.testing.assert_close(outputs[:, :4], before)
        torch.testing.assert_close(head.classifier(outputs[:, 4:]), before)
        merge_head(student)
        torch.testing.assert_close(student(x), before, rtol=1e-4, atol=1e-5)
    assert models.parameters(student) == plain
    merge_head(student)                         # once merged, there is nothing to do
    assert models.parameters(student) == plain


def test_a_run_of_simkd_saves_a_plain_student_with_the_teachers_classes(tiny):
    result = train.main(dataclasses.replace(tiny, method="simkd", kd_weight=1.0, control=True))
    saved = models.open_saved(str(Path(tiny.out) / "student"), runtime.start("cpu", "off", "off"))
    assert saved.classes == ("blob", "plain", "stripes")
    assert models.parameters(saved.model) == result["student"]["params"] == result["control"]["params"]
    assert type(saved.model.classifier) is torch.nn.Linear
