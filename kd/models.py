"""timm models: create one by name, freeze, and save a folder that timm loads by itself.

Weights come from timm's own download, or through `kd/pretrained.py` from elsewhere. No pickle is
opened except by torch.load(weights_only=True), which runs no code that a file holds.
"""

import contextlib
import copy
import difflib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from timm.data import resolve_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from kd import BadInput, TrainingFault, features, one_line, pretrained
from kd.machine import distributed, hub
from kd.machine.files import sync
from kd.machine.runtime import Runtime
from kd.pretrained import declared


# ---- preprocessing ------------------------------------------------------------------------------

class Preprocessing(NamedTuple):
    """What timm declares for a model: how a picture becomes its input."""

    mean: tuple[float, ...]     # (3,), of pixels in [0, 1]
    std: tuple[float, ...]      # (3,)
    interpolation: str          # of the resize
    crop_pct: float             # input size / shorter side after the resize


def preprocessing(model: nn.Module) -> Preprocessing:
    """timm's data configuration of `model`, as far as a picture cropped in its centre can follow it."""
    config = resolve_data_config({}, model=model)
    interpolation = config["interpolation"]
    if interpolation == "random":           # of training views; timm's transform without views takes this one
        interpolation = "bilinear"
    crop_pct = min(config["crop_pct"], 1.0)     # VOLO's 1.15 asks for a black border around the picture
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), interpolation, crop_pct)


class Classifier(NamedTuple):
    """What always travels together: a model, and what it takes to use it."""

    model: nn.Module
    prep: Preprocessing
    size: int                   # side of its square input, in pixels
    classes: tuple[str, ...]
    machine: Runtime            # where, and in which precision


class FromPixels(nn.Module):
    """uint8 `(B, 3, size, size)` to logits `(B, C)`: a model with its normalisation before it.

    with_features: to `(B, C + D)`, the logits and behind them the pooled features (`kd/features.py`).

    So torch.compile sees both, and need not write the normalised pixels to memory. Mean and std are buffers, because a
    constant that is copied to the GPU at every step would wait for the GPU.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, prep: Preprocessing, with_features: bool = False) -> None:
        super().__init__()
        self.model, self.prep, self.with_features = model, prep, with_features
        device = next(model.parameters(), torch.empty(0)).device
        for name, values in (("mean", prep.mean), ("std", prep.std)):
            self.register_buffer(name, torch.tensor(values, device=device)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float().div_(255).sub_(self.mean).div_(self.std)
        return features.logits_and_features(self.model, x) if self.with_features else self.model(x)


# ---- creating models ----------------------------------------------------------------------------

def architecture(model: nn.Module) -> str:
    """timm's name of the architecture, without the tag of its weights."""
    return declared(model)["architecture"]


def timm_name(name: str) -> str:
    """`name` as timm.create_model takes it: `timm/NAME` and `hf-hub:timm/NAME` are timm's own NAME.

    `hf-hub:timm/NAME@REVISION` stays the repository that it names.
    """
    for prefix in ("hf-hub:timm/", "hf_hub:timm/", "timm/"):
        if name.startswith(prefix) and "@" not in name:
            return name.removeprefix(prefix)
    return name


def check(role: str, name: str, weights: str = "none") -> None:
    """Raise BadInput for a name that timm does not know and for a weights file that is absent.

    It loads nothing, so that a run can check its flags before any work. role: "teacher", "student" or "model", which
    names the flag in errors.
    """
    try:
        source, place = timm.models.parse_model_name(timm_name(name))
        if source == "hf-hub":
            validate_repo_id(place.split("@")[0])
    except ValueError as error:
        raise BadInput(f"--{role} {name}: {one_line(error)}") from error

    if source == "local-dir" and not (Path(place) / "config.json").is_file():
        raise BadInput(f"--{role} {name}: no config.json in that folder; give one that train.py or timm saved")
    if not source and not timm.is_model(place):
        # An unknown tag (`resnet50.nope`) has a known stem; anything else gets the most similar names.
        similar = difflib.get_close_matches(place.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        raise BadInput(f"--{role} {name}: timm has no model of that name"
                       + (f"; did you mean {' or '.join(similar)}?" if similar else ""))
    if weights == "imagenet" and source == "local-dir":
        pretrained.path_of(role, place)
    elif weights not in ("none", "imagenet"):
        pretrained.path_of(role, weights)


def create(role: str, name: str, classes: tuple[str, ...], weights: str = "none", size: int | None = None,
           say: Callable[[str], None] = print) -> nn.Module:
    """A timm model with one output per class.

    role: as for `check`.

    name: timm's (`resnet50.a1_in1k`, also behind `timm/` or `hf-hub:timm/`), or `hf-hub:OWNER/NAME` or
    `local-dir:FOLDER`, which hold a config.json that timm reads.

    weights: `none` (random, from torch's seed); `imagenet` (timm's pretrained, or those of the repository or folder
    that `name` gives); a file that timm takes, such as .safetensors or .pth; or a saved folder. A folder's own
    model.safetensors stands for the folder.

    size: side of the input in pixels. Architectures that are built for one size are built for this one, and timm
    resamples their weights; None leaves them at the size that they declare.

    A head with another number of outputs is replaced by a random one. Where the weights name their classes, the head
    must have the data's: one with the same classes in another order is reordered, and one with other classes is
    replaced. `say` reports each.

    Raises BadInput for an unknown name, for a size that the model does not take, and for weights that cannot be
    downloaded, are corrupt, need code to be opened, or belong to another model.
    """
    check(role, name, weights)
    name = timm_name(name)
    source, place = timm.models.parse_model_name(name)      # None, "hf-hub" or "local-dir"; a repository or a folder
    of_timm = weights == "imagenet" and not source
    found = None
    try:
        with hub.cache_if_unreachable() if of_timm or source == "hf-hub" else contextlib.nullcontext():
            arguments = {} if size is None else _size_argument(name, size)
            model = timm.create_model(name, pretrained=of_timm, num_classes=len(classes), **arguments)
            if weights == "imagenet" and source == "hf-hub":
                found = pretrained.read_repository(place)
    except Exception as error:  # the client, the Hub, timm and its models raise exceptions of their own
        raise _not_created(role, name, weights, size, error) from error

    if of_timm:
        pretrained_classes = declared(model).get("num_classes")
        if pretrained_classes not in (None, len(classes)):
            _reset_head(model)
            say(f"{name}: the head of {pretrained_classes} classes was replaced by a random one of {len(classes)}")
    else:
        _reset_head(model)
        if weights != "none":
            found = found or pretrained.read(pretrained.path_of(role, place if weights == "imagenet" else weights))
            pretrained.load(model, found, classes, say)
            _take_preprocessing(model, found, say)

    crop_mode = declared(model).get("crop_mode", "center")
    if crop_mode != "center":
        say(f"{name}: timm declares crop_mode {crop_mode}; here its pictures are cropped in the centre")
    if size is not None:
        _try_size(role, model, size)
    return model


def _size_argument(name: str, size: int) -> dict[str, Any]:
    """timm's argument for an architecture that is built for one size, such as most ViTs; {} for others."""
    with torch.device("meta"):      # takes no memory and no random numbers
        built = timm.models.get_model_input_config(timm.create_model(name))
    return {"img_size": (size, size)} if built["fixed_input_size"] and built["input_size"][1] != size else {}


@torch.no_grad()
def _try_size(role: str, model: nn.Module, size: int) -> None:
    """Raise BadInput if `model` does not take `size` × `size` pixels, such as a mixer of a fixed size."""
    training = model.training
    try:
        for patches in model.modules():
            # timm would leave out the right and lower edge of the picture without a word.
            if isinstance(patches, PatchEmbed) and any(size % side for side in patches.patch_size):
                raise ValueError(f"no multiple of its patches' {patches.patch_size[0]} pixels")
        model.eval()(next(model.parameters()).new_zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_size(role, architecture(model), size, error) from error
    model.train(training)


def _wrong_size(role: str, name: str, size: int | None, error: Exception) -> BadInput:
    flags = "--size or --teacher-size" if role == "teacher" else "--size"
    return BadInput(f"--{role} {name}: takes no pictures of {size} × {size} pixels ({one_line(error)}); give another "
                    f"{flags}, or another model")


def _not_created(role: str, name: str, weights: str, size: int | None, error: Exception) -> BadInput:
    part = f"--{role}-weights {weights}" if weights == "imagenet" else f"--{role}"
    if isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return BadInput(f"{part}: {name}: the Hub cannot be reached, and its cache does not hold this; give a "
                        f".safetensors file or a saved folder, or run offline: python train.py --recipe demo")
    if isinstance(error, KeyError):
        return BadInput(f"{part}: {name}: its config.json has no {error}, so timm did not write it; give another model")
    if isinstance(error, AssertionError):
        return _wrong_size(role, name, size, error)
    return BadInput(f"{part}: {name}: {one_line(error)}")


def _take_preprocessing(model: nn.Module, found: pretrained.Weights, say: Callable[[str], None]) -> None:
    """Mean, std and interpolation that come with the weights are those of the model from now on."""
    before = preprocessing(model)
    declared(model).update({key: found.config[key] for key in ("mean", "std", "interpolation") if key in found.config})
    if preprocessing(model) != before:
        say(f"{found.name}: declares another mean, std or interpolation than {architecture(model)}; its own are used")


def _reset_head(model: Any) -> None:
    """Give the head PyTorch's default initialisation, uniform within 1 / sqrt(inputs).

    timm initialises the head of the EfficientNet family, to which MobileNetV2 belongs, uniformly
    within 1 / sqrt(classes). That is meant for 1000 classes. With 3 classes, training starts at a
    loss of 5 to 10, which spoils pretrained features in the first epoch.
    """
    head = model.get_classifier()
    if isinstance(head, nn.Linear):
        head.reset_parameters()


# ---- models in use ------------------------------------------------------------------------------

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


# ---- saved folders ------------------------------------------------------------------------------

def save(classifier: Classifier, folder: Path, card: str) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    It holds model.safetensors, config.json (labels, mean, std, size, interpolation) and README.md, whose text is
    `card`. The folder is written completely beside its place and then swapped in, so that a reader never meets half of
    it. Of several ranks only the first writes.

    Raises TrainingFault where the disk is full or not writable. The old folder is then untouched.
    """
    if distributed.rank():
        return
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)

    model, prep, size, classes, _ = classifier
    data_config = {"input_size": (3, size, size), "crop_mode": "center", "crop_pct": prep.crop_pct,
                   "mean": prep.mean, "std": prep.std, "interpolation": prep.interpolation}
    # safetensors takes contiguous tensors only, and channels_last ones are not.
    contiguous = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    features.merge_head(contiguous)
    for key in ("label_names", "label_descriptions"):
        declared(contiguous).pop(key, None)     # those of the weights that the model started from
    try:
        timm.models.save_for_hf(contiguous, str(new), model_config={"label_names": list(classes)},
                                safe_serialization=True, data_config=data_config)
        (new / "README.md").write_text(card, encoding="utf-8")
        shutil.copymode(new / "README.md", new / "model.safetensors")   # which safetensors keeps from other users
        for path in new.iterdir():
            sync(path)
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


def load_saved(folder: Path, model: nn.Module) -> None:
    """Load the weights of a folder written by `save` into `model`. Raises BadInput where they cannot be read."""
    try:
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{folder}: its weights cannot be read ({one_line(error)}); put them back, or start again with "
                       f"--overwrite") from error


def open_saved(folder: str, machine: Runtime) -> Classifier:
    """A folder written by `save`: its model in eval mode, on the device, with what it takes to use it.

    Raises BadInput for a folder that `save` did not write.
    """
    if (Path(folder) / "student" / "config.json").is_file():
        raise BadInput(f"{folder}: a run, not one of its models; give {Path(folder) / 'student'}")
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        about = config["pretrained_cfg"]
        prep = Preprocessing(tuple(about["mean"]), tuple(about["std"]), about["interpolation"], about["crop_pct"])
        classes, size = tuple(config["label_names"]), about["input_size"][-1]
    except OSError as error:
        raise BadInput(f"{folder}: no saved model (config.json: {error.strerror}); give a folder that train.py saved, "
                       f"such as runs/demo/student") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}/config.json: not written by train.py ({error!r}); give a folder that it saved"
                       ) from error
    if not (Path(folder) / "model.safetensors").is_file():
        raise BadInput(f"{folder}: model.safetensors is missing; give a folder that train.py saved")
    # Not by its architecture's name alone: timm rebuilds it with the arguments that config.json keeps.
    model = create("model", f"local-dir:{folder}", classes, folder, size, say=lambda line: None)
    # The memory format is that of train.py, because another one rounds differently.
    model = model.to(machine.device).to(memory_format=torch.channels_last).eval()
    return Classifier(model, prep, size, classes, machine)
