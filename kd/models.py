"""timm models in and out: create by name, load weights, freeze, save as a folder that timm loads by itself.

Weights come in as safetensors (or through timm's own download) and go out as safetensors: no pickle is opened here.
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


class Preprocessing(NamedTuple):
    """What timm declares for a model: mean and std of the pixels in [0, 1], how to resize, how much to crop."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float


def preprocessing(model: nn.Module) -> Preprocessing:
    """timm's data configuration of `model`."""
    config = resolve_data_config({}, model=model)
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), config["interpolation"], config["crop_pct"])


def _declared(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model: architecture, the name of its head, the classes of its pretrained weights."""
    config: Any = model.pretrained_cfg
    return config


def architecture(model: nn.Module) -> str:
    """timm's name of the architecture, without the tag of its weights."""
    return _declared(model)["architecture"]


def normalize(views: Tensor, prep: Preprocessing) -> Tensor:
    """uint8 `(B, 3, H, W)` to float32 of the same shape and memory format: (x / 255 - mean) / std."""
    make = _on_gpu if views.is_cuda else torch.tensor
    mean, std = (make(values, device=views.device)[:, None, None] for values in (prep.mean, prep.std))
    return views.float().div_(255).sub_(mean).div_(std)


@functools.cache
def _on_gpu(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: to copy it there at every step would wait for the GPU. (On the CPU a cache would keep the stand-ins
    that an exporter traces with.)"""
    return torch.tensor(values, device=device)


def check(flag: str, name: str, weights: str = "none") -> None:
    """Raise BadInput for a name that timm does not know, and for weights that are no file: ask early."""
    if not timm.is_model(name):
        # an unknown tag (`resnet50.nope`) has a known stem; anything else gets the nearest names
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        raise BadInput(f"--{flag} {name}: timm has no model of that name"
                       + (f"; did you mean {' or '.join(close)}?" if close else ""))
    if weights not in ("none", "imagenet"):
        _weights_file(flag, weights)


def check_size(model: nn.Module, size: int) -> nn.Module:
    """`model` itself; raises BadInput where it does not take `size` × `size` pictures, as a ViT of a fixed size."""
    model.eval()
    try:
        with torch.no_grad():
            model(next(model.parameters()).new_zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        declared = _declared(model)
        raise BadInput(f"--size {size}: {declared['architecture']} takes no pictures of that size ({error}); it "
                       f"declares {declared['input_size'][-1]}") from error
    return model


def create(flag: str, name: str, classes: tuple[str, ...], weights: str = "none",
           say: Callable[[str], None] = print) -> nn.Module:
    """A timm model with one output a class.

    weights: `none` (random, from torch's seed), `imagenet` (timm's pretrained), a `.safetensors` file, or a folder
    saved by `save`. A head of another size is replaced, and `say` gets one line about it. `flag` is named in errors.
    Raises BadInput for an unknown name, weights that cannot be had, are corrupt, or belong to another model.
    """
    check(flag, name, weights)
    if weights == "imagenet":
        model = _create_pretrained(flag, name, len(classes), say)
    else:
        try:
            model = timm.create_model(name, pretrained=False, num_classes=len(classes))
        except RuntimeError as error:
            raise BadInput(f"--{flag} {name}: {error}") from error
        _restart_head(model)
        if weights != "none":
            _load_file(model, _weights_file(flag, weights), say)
    mode = _declared(model).get("crop_mode", "center")
    if mode != "center":
        say(f"{name}: timm declares crop_mode {mode}; here its pictures are cropped in the centre")
    return model


def _create_pretrained(flag: str, name: str, classes: int, say: Callable[[str], None]) -> nn.Module:
    online = hub.reachable()
    try:
        model = timm.create_model(name, pretrained=True, num_classes=classes)
    except Exception as error:  # the client, the Hub and timm each raise their own kinds
        if not online:
            raise BadInput(f"--{flag}-weights imagenet: the Hub cannot be reached and the weights of {name} are not "
                           f"in its cache; give a .safetensors file or a saved folder, or run offline: "
                           f"python train.py --recipe demo") from error
        raise BadInput(f"--{flag}-weights imagenet: {name}: {error}") from error
    declared = _declared(model).get("num_classes")
    if declared not in (None, classes):
        _restart_head(model)
        say(f"{name}: the head of {declared} classes was replaced by a random one of {classes}")
    return model


def _restart_head(model: Any) -> None:
    """Give the head PyTorch's own initialisation, uniform within 1 / sqrt(inputs).

    timm's for the EfficientNet family (MobileNetV2 is one) is uniform within 1 / sqrt(classes): meant for 1000, with 3
    it starts at a loss of 5 to 10 and spoils pretrained features in the first epoch.
    """
    head = model.get_classifier()
    if isinstance(head, nn.Linear):
        head.reset_parameters()


def _weights_file(flag: str, weights: str) -> Path:
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


def _load_file(model: nn.Module, path: Path, say: Callable[[str], None]) -> None:
    try:
        given = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error}); get it again") from error
    wanted = model.state_dict()
    head = _declared(model).get("classifier") or ()  # one name, or a tuple of them
    heads = tuple(f"{one}." for one in ([head] if isinstance(head, str) else head))
    replaced = {key for key in wanted if key.startswith(heads) and key in given
                and given[key].shape != wanted[key].shape} if heads else set()
    lost = sorted(wanted.keys() - given.keys())
    odd = sorted(given.keys() - wanted.keys())
    shapes = sorted(key for key in wanted.keys() & given.keys() - replaced if given[key].shape != wanted[key].shape)
    for keys, what in ((lost, "is missing"), (odd, "is not part of the model"), (shapes, "has another shape")):
        if keys:
            raise BadInput(f"{path}: holds another model than {_declared(model)['architecture']}: {keys[0]} {what} "
                           f"({len(lost)} missing, {len(odd)} unknown, {len(shapes)} of another shape)")
    broken = next((key for key, value in given.items() if value.is_floating_point() and not value.isfinite().all()),
                  None)
    if broken:
        raise BadInput(f"{path}: {broken} holds NaN or infinite weights; get the file again")
    model.load_state_dict({key: value for key, value in given.items() if key not in replaced}, strict=False)
    for key in sorted(replaced):
        if key.endswith("weight"):
            say(f"{path.name}: the head of {len(given[key])} classes was replaced by a random one of "
                f"{len(wanted[key])}")


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode (BatchNorm uses its running statistics and leaves them alone), and no parameter takes a gradient."""
    return model.eval().requires_grad_(False)


def parameters(model: nn.Module) -> int:
    """The number of trainable and frozen parameters, buffers not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def digest(model: nn.Module) -> str:
    """SHA-256 (hex) over the names and bytes of the state dict: equal if and only if the weights are."""
    total = hashlib.sha256()
    for key, value in model.state_dict().items():
        total.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def save(model: nn.Module, folder: Path, classes: tuple[str, ...], prep: Preprocessing, size: int, card: str) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    It holds model.safetensors, config.json (labels, mean, std, size, interpolation) and README.md (`card`). The
    folder is written whole beside its place and then swapped in, so a reader never meets half of it. Of several ranks
    only the first writes.
    """
    if distributed.rank():
        return
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    data_config: dict[str, Any] = {"input_size": (3, size, size), "crop_pct": prep.crop_pct, "mean": prep.mean,
                                   "std": prep.std, "interpolation": prep.interpolation}
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no other strides
    try:
        timm.models.save_for_hf(plain, str(fresh), model_config={"label_names": list(classes)},
                                safe_serialization=True, data_config=data_config)
        (fresh / "README.md").write_text(card)
        for path in fresh.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingFault(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; free some space, "
                            f"then --resume") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load_saved(folder: Path, model: nn.Module) -> nn.Module:
    """Put the weights of a folder made by `save` into `model` (same architecture)."""
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model


def open_saved(folder: str) -> tuple[nn.Module, Preprocessing, int, tuple[str, ...]]:
    """The model of a folder made by `save` (eval mode), its preprocessing, input size and classes. Raises BadInput."""
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
