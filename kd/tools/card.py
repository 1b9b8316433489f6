"""The model card of a saved folder: metadata for the Hub as YAML, then what a person has to know."""

from pathlib import Path
from typing import Any, Mapping, NamedTuple

import timm
from huggingface_hub import EvalResult, ModelCardData

from kd.cli import base_name
from kd.data.sources import hub_id
from kd.methods import NEEDS_LABELS, TEMPERED
from kd.models import timm_name


class Scores(NamedTuple):
    """What the card shows of one model on one split."""

    accuracy: float
    correct: int
    total: int
    macro_f1: float


def render_card(role: str, rows: dict[str, dict[str, Any]], settings: Mapping[str, Any],
                command: str) -> str:
    """The README.md of the saved folder of `role`.

    rows      test scores by role, as in result.json, or only `role`'s own on validation, or none
    settings  of the run, as in config.json
    command   what reproduces the run
    """
    model = _model_of(role, settings)
    title, size = _title(settings["dataset"]), settings["size"]
    if role == "teacher" and settings["teacher_size"]:
        size = settings["teacher_size"]
    repository = settings["push_to_hub"] or "OWNER/NAME"
    split = "test" if any("test_accuracy" in row for row in rows.values()) else "validation"
    scores = {each: _scores(row, split) for each, row in rows.items()}

    table = [f"| {each} | `{_model_of(each, settings)}` | {100 * its.accuracy:.1f} % ({its.correct}/{its.total}) | "
             f"{its.macro_f1:.3f} |" for each, its in scores.items()]
    when = ("The test split was used once, after training." if split == "test" else
            "Training was not over by then.")
    resolution = ""
    if scores:
        total = scores[role].total
        resolution = f", of which {total} were scored: one is {100 / total:.2f} points"
    kept_epoch = rows.get(role, {}).get("kept_epoch", 0) if split == "validation" else 0

    return f"""---
{_metadata(role, settings, scores.get(role), split).strip()}
---
# {model} on {title}

`{model}`, {_description(role, settings)}.

## Recipe

{_recipe(role, settings, kept_epoch)}

## Scores on the {split} split

| | model | accuracy | macro-F1 |
|---|---|---|---|
{chr(10).join(table)}

{when}

## Reproduce

```
{command}
```

with `--dataset` naming the same data. `config.json` of the run has every setting.

## Use

```python
import timm, torch
from PIL import Image, ImageOps

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_data_config({{"crop_mode": "center"}}, model=model))
image = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright, as the camera was held
if image.has_transparency_data:  # over white
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
with torch.no_grad():
    probabilities = model(transform(image.convert("RGB"))[None]).softmax(1)[0]
print(dict(zip(model.pretrained_cfg["label_names"], probabilities.tolist())))
```

A picture is turned upright, and its transparent parts become white. The transform then resizes the shorter side, cuts
the central {size} × {size} pixels and normalises them. Training did the same.
Mean, std, interpolation, the share of the picture that is used and the labels are in `config.json`.

## Limits

The model knows the classes of `{title}` and no other: it names one of them whatever the picture shows. Its scores hold
for pictures like those of that data set{resolution}.
Other cameras, places and seasons were not tried. The scores are those of one seed; another seed may give others.
The licence of the pictures, and of weights that the teacher started from, may add terms.
"""


def _model_of(role: str, settings: Mapping[str, Any]) -> str:
    """timm's name of the model in this role. The control is a student. Of a folder only the last part is named."""
    return base_name(settings["teacher" if role == "teacher" else "student"])


def _description(role: str, settings: Mapping[str, Any]) -> str:
    """What the model is, and what it learned from."""
    if role == "teacher" and not settings["teacher_epochs"]:
        return "the teacher of a distillation, used as it was loaded"
    if role == "teacher":
        return "the teacher of a distillation: it learned from the labels only"
    if role == "control":
        return "the control of a distillation: the student's recipe without the teacher, from the labels only"
    if not settings["kd_weight"]:
        return "the student's recipe without a teacher (λ = 0): it learned from the labels only"
    if settings["kd_weight"] == 1 and settings["method"] not in NEEDS_LABELS:
        return "the student of a distillation (λ = 1): it learned from its teacher only, and read no label"
    return "the student of a distillation: it learned from the labels and from its teacher"


def _title(dataset: str) -> str:
    """The name of a data set. Of a folder only the last part, because the rest says something of a machine."""
    return Path(dataset).name if hub_id(dataset) is None else dataset


def _recipe(role: str, settings: Mapping[str, Any], kept_epoch: int) -> str:
    """What was trained, as a Markdown list. kept_epoch: of a training that is not over, else 0."""
    pretrained = settings["teacher_weights"] == "imagenet"
    start = "from" if pretrained else "not from"
    whose = "its" if ":" in timm_name(settings["teacher"]) else "timm's"    # of a repository or folder
    tuning = (f"fine-tuned for {settings['teacher_epochs']} epochs" if settings["teacher_epochs"] else
              "used as loaded")
    control = "; the control's λ is 0" if role == "control" else ""
    best = f" (epoch {kept_epoch} so far)" if kept_epoch else ""
    weights = settings["student_weights"]
    student_start = "random weights" if weights == "none" else (
        "pretrained weights" if weights == "imagenet" else f"`{base_name(weights)}`")
    teacher_size = f", its teacher at {settings['teacher_size']} px" if settings["teacher_size"] else ""
    chosen = ("last epoch, as agreed before" if settings["select"] == "last" else
              f"best epoch by validation accuracy{best}")
    lines = [
        f"- teacher `{_model_of('teacher', settings)}`, {start} {whose} pretrained weights, {tuning}",
        f"- student `{_model_of('student', settings)}`, from {student_start}, {settings['epochs']} epochs at "
        f"{settings['size']} px{teacher_size}, seed {settings['seed']}",
        f"- loss (1 - λ)·CE + λ·{_method(settings)}, λ = {settings['kd_weight']:g}{control}",
    ]
    if role != "teacher" or settings["teacher_epochs"]:
        lines.append(f"- the weights are those of the {chosen}")
    if settings["labels"]:
        others = ", and the student learns the others from its teacher" if settings["kd_weight"] else ""
        lines.insert(0, f"- {settings['labels']} labels of the training split; whoever learns from labels knows only "
                        f"these pictures{others}")
    if settings["unlabelled"]:
        lines.insert(0, f"- more pictures without labels for the student: `{base_name(settings['unlabelled'])}`")
    return "\n".join(lines)


def _method(settings: Mapping[str, Any]) -> str:
    """What the student learned of its teacher, with its temperature."""
    temperature = f", T = {settings['temperature']:g}" if settings["method"] in TEMPERED else ""
    standardised = " of standardised logits" if settings["standardise"] else ""
    if settings["method"] == "kd":
        return f"T²·KL(teacher‖student){standardised}{temperature}"
    return f"`{settings['method']}`{standardised}{temperature}"


def _scores(row: dict[str, Any], split: str) -> Scores:
    prefix = "test_" if split == "test" else ""
    return Scores(*(row[f"{prefix}{name}"] for name in Scores._fields))


def _metadata(role: str, settings: Mapping[str, Any], scores: Scores | None, split: str) -> str:
    """The card's metadata as YAML. scores: of `role`, if there are any yet."""
    # A data set that is only on this machine has no id: the Hub would link its name to a stranger's.
    dataset = hub_id(settings["dataset"])
    results = None
    if scores:
        results = [EvalResult(task_type="image-classification", task_name="Image classification",
                              dataset_type=dataset or "imagefolder", dataset_name=_title(settings["dataset"]),
                              dataset_split=split, metric_type=metric, metric_name=name, metric_value=value)
                   for metric, name, value in (("accuracy", "Accuracy", scores.accuracy),
                                               ("f1", "Macro F1", scores.macro_f1))]

    # The Hub has four relations (adapter, finetune, merge, quantized). None of them means "distilled from",
    # so that a student names its base model without a relation.
    base: str | None = None
    relation = None
    distilled = role == "student" and settings["kd_weight"]
    if settings["teacher_weights"] == "imagenet" and (role == "teacher" or distilled):
        source, place = timm.models.parse_model_name(timm_name(settings["teacher"]))
        if source == "hf-hub":
            base = place.split("@")[0]      # without the revision
        elif not source:
            base = getattr(timm.get_pretrained_cfg(place), "hf_hub_id", None)   # such as timm/resnet50.a1_in1k
        relation = "finetune" if base and role == "teacher" and settings["teacher_epochs"] else None

    return ModelCardData(
        license="apache-2.0", library_name="timm", pipeline_tag="image-classification",
        datasets=[dataset] if dataset else None, metrics=["accuracy", "f1"],
        base_model=base, base_model_relation=relation,
        tags=["image-classification", "timm", "knowledge-distillation"],
        model_name=_model_of(role, settings) if results else None, eval_results=results).to_yaml()
