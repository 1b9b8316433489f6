"""timm models: create one by name, load weights, freeze, and save a folder that timm loads by itself.

Weights are safetensors files, or come through timm's own download. No pickle is opened here.
"""

import copy
import difflib
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from kd import BadInput, TrainingFault
from kd.machine import distributed, hub


# Preprocessing

class Preprocessing(NamedTuple):
    """What timm declares for a model: how a picture becomes its input."""

    mean: tuple[float, ...]     # (3,), of pixels in [0, 1]
    std: tuple[float, ...]      # (3,)
    interpolation: str          # of the resize
    crop_pct: float             # input size / shorter side after the resize


def preprocessing(model: nn.Module) -> Preprocessing:
    """timm's data configuration of `model`."""
    config = resolve_data_config({}, model=model)
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), config["interpolation"], config["crop_pct"])


def normalize(pixels: Tensor, prep: Preprocessing) -> Tensor:
    """uint8 `(B, 3, H, W)` to float32 of the same shape and memory format: (x / 255 - mean) / std."""
    constant = _constant_on_gpu if pixels.is_cuda else torch.tensor
    mean, std = (constant(values, device=pixels.device)[:, None, None] for values in (prep.mean, prep.std))
    return pixels.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _constant_on_gpu(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Cached, because copying it to the GPU at every step would wait for the GPU.

    Not on the CPU: torch.export's fake tensors would be cached.
    """
    return torch.tensor(values, device=device)


# Creating models

def _declared(model: nn.Module) -> dict[str, Any]:
    """timm's record of a model: architecture, name of the head, classes of the pretrained weights."""
    config: Any = model.pretrained_cfg
    return config


def architecture(model: nn.Module) -> str:
    """timm's name of the architecture, without the tag of its weights."""
    return _declared(model)["architecture"]


def check(flag: str, name: str, weights: str = "none") -> None:
    """Raise BadInput for a name that timm does not know and for a weights file that is absent.

    It loads nothing, so that a run can check its flags before any work. `flag` is named in errors.
    """
    if not timm.is_model(name):
        # An unknown tag (`resnet50.nope`) has a known stem; anything else gets the most similar names.
        similar = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        raise BadInput(f"--{flag} {name}: timm has no model of that name"
                       + (f"; did you mean {' or '.join(similar)}?" if similar else ""))
    if weights not in ("none", "imagenet"):
        _weights_path(flag, weights)


def check_size(model: nn.Module, size: int) -> None:
    """Raise BadInput if `model` does not take `size` × `size` pixels, such as a ViT of a fixed size.

    Leaves the model in eval mode.
    """
    model.eval()
    try:
        with torch.no_grad():
            model(next(model.parameters()).new_zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        declared = _declared(model)
        raise BadInput(f"--size {size}: {declared['architecture']} takes no pictures of that size ({error}); it "
                       f"declares {declared['input_size'][-1]}") from error


def create(flag: str, name: str, classes: tuple[str, ...], weights: str = "none",
           say: Callable[[str], None] = print) -> nn.Module:
    """A timm model with one output per class.

    weights: `none` (random, from torch's seed), `imagenet` (timm's pretrained), a `.safetensors`
    file, or a folder written by `save`. A head with another number of outputs is replaced by a
    random one, which `say` reports. `flag` is named in errors.

    Raises BadInput for an unknown name, and for weights that cannot be downloaded, are corrupt, or
    belong to another model.
    """
    check(flag, name, weights)
    if weights == "imagenet":
        model = _create_pretrained(flag, name, len(classes), say)
    else:
        try:
            model = timm.create_model(name, pretrained=False, num_classes=len(classes))
        except RuntimeError as error:
            raise BadInput(f"--{flag} {name}: {error}") from error
        _reset_head(model)
        if weights != "none":
            _load_weights(model, _weights_path(flag, weights), say)

    crop_mode = _declared(model).get("crop_mode", "center")
    if crop_mode != "center":
        say(f"{name}: timm declares crop_mode {crop_mode}; here its pictures are cropped in the centre")
    return model


def _create_pretrained(flag: str, name: str, classes: int, say: Callable[[str], None]) -> nn.Module:
    online = hub.reachable()
    try:
        model = timm.create_model(name, pretrained=True, num_classes=classes)
    except Exception as error:  # the client, the Hub and timm raise exceptions of their own
        if not online:
            raise BadInput(f"--{flag}-weights imagenet: the Hub cannot be reached and the weights of {name} are not "
                           f"in its cache; give a .safetensors file or a saved folder, or run offline: "
                           f"python train.py --recipe demo") from error
        raise BadInput(f"--{flag}-weights imagenet: {name}: {error}") from error
    pretrained_classes = _declared(model).get("num_classes")
    if pretrained_classes not in (None, classes):
        _reset_head(model)
        say(f"{name}: the head of {pretrained_classes} classes was replaced by a random one of {classes}")
    return model


def _reset_head(model: Any) -> None:
    """Give the head PyTorch's default initialisation, uniform within 1 / sqrt(inputs).

    timm initialises the head of the EfficientNet family, to which MobileNetV2 belongs, uniformly
    within 1 / sqrt(classes). That is meant for 1000 classes. With 3 classes, training starts at a
    loss of 5 to 10, which spoils pretrained features in the first epoch.
    """
    head = model.get_classifier()
    if isinstance(head, nn.Linear):
        head.reset_parameters()


# Loading weights

def _weights_path(flag: str, weights: str) -> Path:
    path = Path(weights)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise BadInput(f"--{flag}-weights {weights}: no such file; use imagenet, none, a .safetensors file, or a "
                       f"folder with model.safetensors")
    if path.suffix != ".safetensors":
        raise BadInput(f"--{flag}-weights {weights}: not a .safetensors file; others may run code when they are "
                       f"opened: convert it with safetensors.torch.save_file")
    return path


def _load_weights(model: nn.Module, path: Path, say: Callable[[str], None]) -> None:
    """Load a safetensors file into `model`. Only the head may have another shape: it then stays random."""
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error}); get it again") from error

    state = model.state_dict()
    other_shape = {key for key in state.keys() & weights.keys() if weights[key].shape != state[key].shape}
    heads = _declared(model).get("classifier") or ()    # one name, or a tuple of them
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    new_head = {key for key in other_shape if key.startswith(prefixes)}

    missing, unknown = sorted(state.keys() - weights.keys()), sorted(weights.keys() - state.keys())
    mismatched = sorted(other_shape - new_head)
    for keys, problem in ((missing, "is missing"), (unknown, "is not part of the model"),
                          (mismatched, "has another shape")):
        if keys:
            raise BadInput(f"{path}: holds another model than {architecture(model)}: {keys[0]} {problem} "
                           f"({len(missing)} missing, {len(unknown)} unknown, {len(mismatched)} of another shape)")
    for key, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise BadInput(f"{path}: {key} holds NaN or infinite weights; get the file again")

    model.load_state_dict({key: value for key, value in weights.items() if key not in new_head}, strict=False)
    for key in sorted(new_head):
        if key.endswith("weight"):
            say(f"{path.name}: the head of {len(weights[key])} classes was replaced by a random one of "
                f"{len(state[key])}")


# Models in use

def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, where BatchNorm's running statistics stay fixed, and no gradients. Returns `model`."""
    return model.eval().requires_grad_(False)


def parameters(model: nn.Module) -> int:
    """The number of parameters, trainable or frozen. Buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def digest(model: nn.Module) -> str:
    """SHA-256 (hex) over the names and bytes of the state dict: equal if and only if the weights are."""
    total = hashlib.sha256()
    for key, value in model.state_dict().items():
        total.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


# Saved folders

def save(model: nn.Module, folder: Path, classes: tuple[str, ...], prep: Preprocessing, size: int, card: str) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    It holds model.safetensors, config.json (labels, mean, std, size, interpolation) and README.md,
    whose text is `card`. The folder is written completely beside its place and then swapped in, so
    that a reader never meets half of it. Of several ranks only the first writes.

    Raises TrainingFault where the disk is full or not writable. The old folder is then untouched.
    """
    if distributed.rank():
        return
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)

    data_config: dict[str, Any] = {"input_size": (3, size, size), "crop_pct": prep.crop_pct, "mean": prep.mean,
                                   "std": prep.std, "interpolation": prep.interpolation}
    # safetensors takes contiguous tensors only, and channels_last ones are not.
    contiguous = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    try:
        timm.models.save_for_hf(contiguous, str(new), model_config={"label_names": list(classes)},
                                safe_serialization=True, data_config=data_config)
        (new / "README.md").write_text(card)
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingFault(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; free some space, "
                            f"then --resume") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load_saved(folder: Path, model: nn.Module) -> nn.Module:
    """Load the weights of a folder written by `save` into `model`, which has the same architecture."""
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model


def open_saved(folder: str) -> tuple[nn.Module, Preprocessing, int, tuple[str, ...]]:
    """A folder written by `save`: its model in eval mode, preprocessing, input size (pixels) and classes.

    Raises BadInput for a folder that `save` did not write.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        declared = config["pretrained_cfg"]
        prep = Preprocessing(tuple(declared["mean"]), tuple(declared["std"]), declared["interpolation"],
                             declared["crop_pct"])
        name, classes, size = config["architecture"], tuple(config["label_names"]), declared["input_size"][-1]
    except OSError as error:
        raise BadInput(f"{folder}: no saved model (config.json: {error.strerror}); give a folder that train.py saved, "
                       f"such as runs/demo/student") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}/config.json: not written by train.py ({error!r}); give a folder that it saved"
                       ) from error
    if not (Path(folder) / "model.safetensors").is_file():
        raise BadInput(f"{folder}: model.safetensors is missing; give a folder that train.py saved")
    return create("model", name, classes, folder, say=lambda line: None).eval(), prep, size, classes
