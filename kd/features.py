"""Pooled features: what a model's linear classifier is given, for the methods that compare them.

timm's models have them in common: `forward_features` gives the last feature maps, `forward_head` pools
them, and `get_classifier` is the layer that makes logits of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kd import BadInput, one_line
from kd.pretrained import declared


def logits_and_features(model: nn.Module, x: Tensor) -> Tensor:
    """Normalised pixels `(B, 3, H, W)` to `(B, C + D)`: the C logits, and behind them the D pooled features."""
    timm_model: Any = model
    pooled = timm_model.forward_head(timm_model.forward_features(x), pre_logits=True)
    classifier = timm_model.get_classifier()
    if isinstance(classifier, ReusedHead):
        pooled = classifier.projector(pooled)
        classifier = classifier.classifier
    return torch.cat([classifier(pooled), pooled], dim=1)


def width(model: nn.Module) -> int:
    """D, how many pooled features the classifier of `model` is given."""
    timm_model: Any = model
    return timm_model.get_classifier().in_features


@torch.no_grad()
def refuse_without(role: str, model: nn.Module, method: str, size: int) -> None:
    """Raise BadInput for a model whose logits are not a linear function of pooled features.

    role: "teacher" or "student", to name the flag. Leaves the model in eval mode.
    """
    model.eval()
    parameter = next(model.parameters())
    picture = torch.linspace(-2, 2, 3 * size * size, device=parameter.device).view(1, 3, size, size)
    reason = "its logits are not a linear function of them"
    try:
        timm_model: Any = model
        classifier = timm_model.get_classifier()
        same = isinstance(classifier, nn.Linear) and classifier.bias is not None
        if same:
            outputs = logits_and_features(model, picture)
            same = torch.allclose(outputs[:, :-width(model)], model(picture), rtol=1e-3, atol=1e-4)
    except (torch.OutOfMemoryError, torch.AcceleratorError):        # the model is not to blame
        raise
    except Exception as error:  # each architecture has its own way
        same, reason = False, one_line(error)
    if not same:
        name = declared(model)["architecture"]
        raise BadInput(f"--{role} {name}: has no pooled features for --method {method} ({reason}); use another model, "
                       f"or a method on logits such as kd")


# ---- the teacher's classifier, reused by a student ------------------------------------------------------

class ReusedHead(nn.Module):
    """A linear map from the student's features to the teacher's, and the teacher's frozen classifier behind it.

    Chen et al. 2022 (SimKD), arXiv:2203.14001. Here both are linear, so `merge_head` makes one layer of them.
    """

    def __init__(self, student_width: int, classifier: nn.Linear) -> None:
        super().__init__()
        self.projector = nn.Linear(student_width, classifier.in_features)
        self.classifier = nn.Linear(classifier.in_features, classifier.out_features)
        self.classifier.load_state_dict(classifier.state_dict())
        self.classifier.requires_grad_(False)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classifier(self.projector(pooled))


def reuse_head(student: nn.Module, teacher: nn.Module) -> None:
    """Give `student` the classifier of `teacher`, in place. The map before it is drawn from torch's seed."""
    timm_student: Any = student
    timm_teacher: Any = teacher
    own: nn.Linear = timm_student.get_classifier()
    head = ReusedHead(own.in_features, timm_teacher.get_classifier()).to(own.weight.device)
    _replace(student, own, head)


@torch.no_grad()
def merge_head(model: nn.Module) -> None:
    """Make one linear layer of a `ReusedHead`, in place: W·(P·h + b) + c = (W·P)·h + (W·b + c).

    The model is then what timm builds by its name. Nothing happens to a model with a head of its own.
    """
    timm_model: Any = model
    head = timm_model.get_classifier()
    if not isinstance(head, ReusedHead):
        return
    weight, bias = (values.cpu().double() for values in (head.projector.weight, head.projector.bias))
    outer, outer_bias = (values.cpu().double() for values in (head.classifier.weight, head.classifier.bias))
    merged = nn.Linear(weight.shape[1], len(outer))
    merged.weight.copy_(outer @ weight)
    merged.bias.copy_(outer @ bias + outer_bias)
    _replace(model, head, merged.to(head.projector.weight.device))


def _replace(model: nn.Module, part: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `part`, in place. Not every model of timm declares the name of its classifier."""
    name, = (name for name, module in model.named_modules() if module is part)
    model.set_submodule(name, new)
