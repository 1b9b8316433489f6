"""The model card of a saved folder: YAML that the Hub's validator takes, then what a person has to know."""

from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from kd.data.sources import hub_id

WHAT = {
    "teacher": "the teacher of a distillation: it learned from the labels alone",
    "student": "the student of a distillation: it learned from the labels and from the logits of its teacher",
    "control": "the control of a distillation: the student's recipe without the teacher, from the labels alone",
}


def render_card(role: str, rows: dict[str, dict[str, Any]], *, teacher: str, student: str, pretrained: bool,
                dataset: str, size: int, epochs: int, teacher_epochs: int, temperature: float, kd_weight: float,
                seed: int, repo: str, command: str) -> str:
    """README.md of `role`. rows: scores by role, as `report.test_row` gives them, or `role`'s own on validation.

    teacher, student: timm's names; pretrained: the teacher began with timm's weights; repo: where it is pushed, or "";
    command: what reproduces the run.
    """
    name = teacher if role == "teacher" else student
    title = Path(dataset).name if hub_id(dataset) is None else dataset
    split = "test" if any("test_accuracy" in row for row in rows.values()) else "validation"
    scores = {of: _scores(row, split) for of, row in rows.items()}
    lines = [f"| {of} | `{teacher if of == 'teacher' else student}` | {100 * accuracy:.1f} % ({correct}/{total}) | "
             f"{macro_f1:.3f} |" for of, (accuracy, correct, total, macro_f1) in scores.items()]
    chosen = rows.get(role, {}).get("best_epoch")
    recipe = [f"- teacher `{teacher}`, " + ("from timm's pretrained weights" if pretrained else
                                            "not from timm's pretrained weights") +
              (f", fine-tuned for {teacher_epochs} epochs" if teacher_epochs else ", as loaded"),
              f"- student `{student}`, from random weights, {epochs} epochs at {size} px, seed {seed}",
              f"- loss (1 - λ)·CE + λ·T²·KL(teacher‖student), T = {temperature:g}, λ = {kd_weight:g}"
              + ("; the control's λ is 0" if role == "control" else ""),
              "- the weights kept are those of the best epoch by validation accuracy"
              + (f" (epoch {chosen} so far)" if chosen and split == "validation" else "")]
    when = "The test split was used once, after training." if split == "test" else "Training was not over by then."
    counted = f", of which {scores[role][2]} were scored: one is {100 / scores[role][2]:.2f} points" if scores else ""
    meta = _yaml(role, name, title, scores.get(role), split, teacher if pretrained else "", dataset, teacher_epochs,
                 kd_weight)
    return f"""---
{meta.strip()}
---
# {name} on {title}

`{name}`, {WHAT[role]}.

## Recipe

{chr(10).join(recipe)}

## Scores on the {split} split

| | model | accuracy | macro-F1 |
|---|---|---|---|
{chr(10).join(lines)}

{when}

## Reproduce

```
{command}
```

with `--dataset` naming the same data. `config.json` of the run has every setting.

## Use

```python
import timm, torch
from PIL import Image

model = timm.create_model("hf-hub:{repo or 'OWNER/NAME'}", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
with torch.no_grad():
    shares = model(transform(Image.open("photo.jpg").convert("RGB"))[None]).softmax(1)[0]
print(dict(zip(model.pretrained_cfg["label_names"], shares.tolist())))
```

The transform resizes the shorter side, cuts the central {size} × {size} pixels and normalises them, as training did.
Mean, std, interpolation, the share that is kept and the labels are in `config.json`.

## Limits

It knows the classes of `{title}` and no other: whatever it is shown, it names one of them. Its scores hold for pictures
like those of that data set{counted}; other cameras, places and seasons
were not tried. One seed was run, and the chance in it not measured. The licence of the pictures, and of weights that
the teacher began with, may add terms.
"""


def _scores(row: dict[str, Any], split: str) -> tuple[float, int, int, float]:
    """Accuracy, the counts it is made of, and macro-F1."""
    at = "test_" if split == "test" else ""
    return row[f"{at}accuracy"], row[f"{at}correct"], row[f"{at}total"], row[f"{at}macro_f1"]


def _yaml(role: str, name: str, title: str, scores: tuple[float, int, int, float] | None, split: str, pretrained: str,
          dataset: str, teacher_epochs: int, kd_weight: float) -> str:
    known = hub_id(dataset)  # what is on this machine only has no id, and the Hub would link to a stranger's
    results = [EvalResult(task_type="image-classification", task_name="Image classification",
                          dataset_type=known or "imagefolder", dataset_name=title, dataset_split=split,
                          metric_type=metric, metric_name=called, metric_value=value)
               for metric, called, value in (("accuracy", "Accuracy", scores[0]), ("f1", "Macro F1", scores[3]))
               ] if scores else None
    # no relation that the Hub knows (adapter, finetune, merge, quantized) says "distilled", so a student claims none
    base: str | None = None
    relation = None
    if pretrained and (role == "teacher" or (role == "student" and kd_weight)):
        base = getattr(timm.get_pretrained_cfg(pretrained), "hf_hub_id", None)  # such as timm/resnet50.a1_in1k
        relation = "finetune" if base and role == "teacher" and teacher_epochs else None
    return ModelCardData(
        license="apache-2.0", library_name="timm", pipeline_tag="image-classification",
        datasets=[known] if known else None, metrics=["accuracy", "f1"], base_model=base,
        base_model_relation=relation, tags=["image-classification", "timm", "knowledge-distillation"],
        model_name=name if results else None, eval_results=results).to_yaml()
