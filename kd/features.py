"""Pooled features: what a model's linear classifier is given, for the methods that compare them.

All of timm's models have three functions for this. `forward_features` gives the last feature maps,
`forward_head` pools them, and `get_classifier` gives the layer that makes logits of them. A `model` here
is such a model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kd import BadInput, one_line
from kd.pretrained import declared


def logits_and_features(model: Any, x: Tensor) -> Tensor:
    """Normalised pixels `(B, 3, H, W)` to `(B, C + D)`: the C logits, and behind them the D pooled features."""
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    classifier = model.get_classifier()
    if isinstance(classifier, ReusedHead):
        pooled = classifier.projector(pooled)
        classifier = classifier.classifier
    return torch.cat([classifier(pooled), pooled], dim=1)


def width(model: Any) -> int:
    """D, how many pooled features the classifier of `model` is given."""
    return model.get_classifier().in_features


@torch.no_grad()
def refuse_without(role: str, model: Any, method: str, size: int) -> None:
    """Raise BadInput for a model whose logits are not a linear function of pooled features.

    role: "teacher" or "student", to name the flag. Leaves the model in eval mode.
    """
    model.eval()
    parameter = next(model.parameters())
    picture = torch.linspace(-2, 2, 3 * size * size, device=parameter.device).view(1, 3, size, size)
    reason = "its logits are not a linear function of them"
    try:
        classifier = model.get_classifier()
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


def reuse_head(student: Any, teacher: Any) -> None:
    """Give `student` the classifier of `teacher`, in place. The map before it is drawn from torch's seed."""
    own: nn.Linear = student.get_classifier()
    head = ReusedHead(own.in_features, teacher.get_classifier()).to(own.weight.device)
    _replace(student, own, head)


@torch.no_grad()
def merge_head(model: Any) -> None:
    """Make one linear layer of a `ReusedHead`, in place: W·(P·h + b) + c = (W·P)·h + (W·b + c).

    The model is then what timm builds by its name. Nothing happens to a model with a head of its own.
    """
    head = model.get_classifier()
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
