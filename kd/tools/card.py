"""The model card of a saved folder: metadata for the Hub as YAML, then what a person has to know."""

from pathlib import Path
from typing import Any, Mapping

import timm
from huggingface_hub import EvalResult, ModelCardData

from kd.cli import base_name
from kd.config import NEED_LABELS
from kd.data.table import hub_id


def render_card(role: str, rows: dict[str, dict[str, Any]], settings: Mapping[str, Any], command: str) -> str:
    """The README.md of the saved folder of `role`.

    rows      test scores by role, as in result.json, or only `role`'s own on validation, or none
    settings  of the run, as in config.json
    command   what reproduces the run
    """
    dataset = settings["dataset"]
    title = dataset if hub_id(dataset) else Path(dataset).name
    on_test = any("test_accuracy" in row for row in rows.values())
    split, prefix = ("test", "test_") if on_test else ("validation", "")
    when = "The test split was used once, after training." if on_test else "Training was not over by then."
    table = "\n".join(f"| {each} | `{_network(each, settings)}` | {100 * row[f'{prefix}accuracy']:.1f} % "
                      f"({row[f'{prefix}correct']}/{row[f'{prefix}total']}) | {row[f'{prefix}macro_f1']:.3f} |"
                      for each, row in rows.items())
    repository = settings["push_to_hub"] or "OWNER/NAME"
    metrics = {name: rows[role][f"{prefix}{name}"] for name in ("accuracy", "macro_f1")} if role in rows else {}
    return f"""---
{_metadata(role, settings, title, split, metrics).strip()}
---
# {_network(role, settings)} on {title}

{_description(role, settings)}

| | model | accuracy on {split} | macro-F1 |
|---|---|---|---|
{table}

{when} The scores are those of one seed; another seed may give others. This command makes the run again, with
`--dataset` naming the same data:

```
{command}
```

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

## Limits

The model names one of the classes of `{title}` whatever a picture shows. Its scores hold for pictures like those of
that data set; other cameras, places and seasons were not tried. The licence of the pictures, and of weights that a
model started from, may add terms.
"""


def _network(role: str, settings: Mapping[str, Any]) -> str:
    """timm's name of the model in this role. The control is a student. Of a folder only the last part is named."""
    return base_name(settings["teacher" if role == "teacher" else "student"])


def _description(role: str, settings: Mapping[str, Any]) -> str:
    """What the model is, and what it learned from."""
    weight = settings["kd_weight"]
    labels = f"{settings['labels']} of the training labels" if settings["labels"] else "the labels"
    if role == "teacher":
        return "The teacher of a distillation, " + (f"which learned from {labels} only." if settings["teacher_epochs"]
                                                    else "used as it was loaded.")
    if role == "control" or not weight:
        return f"The student's recipe without a teacher: it learned from {labels} only."
    only_teacher = weight == 1 and settings["method"] not in NEED_LABELS
    return (f"The student of a distillation by `{settings['method']}`, λ = {weight:g}: it learned from its teacher "
            f"`{_network('teacher', settings)}` {'only, and read no label' if only_teacher else f'and from {labels}'}.")


def _metadata(role: str, settings: Mapping[str, Any], title: str, split: str, metrics: Mapping[str, float]) -> str:
    """The card's metadata as YAML. metrics: of this model on `split`, by their names in result.json."""
    # A data set that is only on this machine has no id: the Hub would link its name to a stranger's.
    dataset = hub_id(settings["dataset"])
    results = [EvalResult("image-classification", dataset or "imagefolder", title, metric_type, metrics[name],
                          dataset_split=split)
               for name, metric_type in (("accuracy", "accuracy"), ("macro_f1", "f1")) if name in metrics]

    # base_model: whose weights it started from. The Hub has no relation for a teacher.
    learner = "teacher" if role == "teacher" else "student"
    place = settings[learner].removeprefix("hf-hub:").removeprefix("timm/").split("@")[0]
    base = None
    if settings[f"{learner}_weights"] == "imagenet" and not place.startswith("local-dir:"):
        base = place if "/" in place else getattr(timm.get_pretrained_cfg(place), "hf_hub_id", None)
    return ModelCardData(
        license="apache-2.0", library_name="timm", pipeline_tag="image-classification",
        datasets=[dataset] if dataset else None, metrics=["accuracy", "f1"], base_model=base,
        tags=["image-classification", "timm", "knowledge-distillation"],
        model_name=_network(role, settings) if results else None, eval_results=results or None).to_yaml()
