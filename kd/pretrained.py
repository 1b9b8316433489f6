"""Weights from a file, a saved folder or a Hub repository, and how they fit a model.

Everything that timm reads is read here, by timm. What differs from timm: weights of another model are refused, never
left random in part, and the classes that a folder declares are compared with the data's.
"""

import contextlib
import json
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import timm
import torch
from torch import Tensor, nn

from kd import BadInput, one_line

# What timm calls the weights of a folder, model.safetensors first. The first that is there is taken.
FILE_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors",
              "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")


class Weights(NamedTuple):
    """What a file, a folder or a repository holds."""

    place: str                  # the file or the repository, for errors
    name: str                   # in short, for what is said
    state: dict[str, Tensor]    # perhaps in the layout of an older timm, or of the model's authors
    config: Mapping[str, Any]   # what it declares: architecture, label_names, mean, std; {} where nothing does


def declared(model: nn.Module) -> dict[str, Any]:
    """timm's record of a model: architecture, name of the head, mean and std, classes of the pretrained weights."""
    config: Any = model.pretrained_cfg
    return config


# ---- reading ----------------------------------------------------------------------------------------------------

def path_of(role: str, weights: str) -> Path:
    """The file that `weights`, a file or a saved folder, stands for. Raises BadInput where there is none."""
    path = Path(weights).expanduser()
    if path.is_dir():
        path = next((path / name for name in FILE_NAMES if (path / name).is_file()), path / FILE_NAMES[0])
    if not path.is_file():
        raise BadInput(f"--{role}-weights {weights}: no such file; use imagenet, none, a weights file such as "
                       f".safetensors, or a folder with {FILE_NAMES[0]}")
    return path


def read(path: Path) -> Weights:
    """A weights file, with the config.json beside it if it has the name of a saved folder's weights.

    A state dict may lie below the keys that timm knows, such as `state_dict` or `model_ema`. Raises BadInput for a file
    that is damaged, holds no weights, or needs code to be opened.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = timm.models.load_state_dict(str(path))    # a pickle: by torch.load(weights_only=True)
        state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # given damaged bytes, the readers raise nearly anything
        if "unsupported global" in str(error.__cause__).lower() or "TorchScript" in str(error):
            raise BadInput(f"{path}: opening it would run code that it holds; save its state dict alone, best with "
                           f"safetensors.torch.save_file") from error
        raise BadInput(f"{path}: not a readable weights file; get it again") from error
    if not state:
        raise BadInput(f"{path}: holds no weights; give a state dict, as torch and safetensors save it")
    record = path.parent / "config.json"
    if path.name not in FILE_NAMES or not record.is_file():
        return Weights(str(path), path.name, state, {})
    try:
        config = json.loads(record.read_text("utf-8"))
        about = {**config.get("pretrained_cfg", {}), **config}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{record}: not readable ({one_line(error)}); get it again") from error
    # The config.json of another library declares nothing here.
    return Weights(str(path), path.resolve().parent.name, state, about if "architecture" in about else {})


def read_repository(repository: str) -> Weights:
    """The weights and config.json of a Hub repository, through timm's download and with its exceptions."""
    config, architecture, _ = timm.models.load_model_config_from_hf(repository)
    state = timm.models.load_state_dict_from_hf(repository)
    return Weights(repository, repository, state, {**config, "architecture": architecture})


# ---- loading ----------------------------------------------------------------------------------------------------

def load(model: nn.Module, weights: Weights, classes: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Load `weights` into `model`, which has an output per class.

    The head stays as it is, random, where its weights have another shape or other classes. All other weights must fit.
    Raises BadInput for weights of another model, and for NaN or infinite ones.
    """
    architecture, expected = declared(model)["architecture"], model.state_dict()
    heads = _heads(model)
    head_keys = {key for key in expected if key.startswith(tuple(f"{head}." for head in heads))}
    state = _converted(model, weights.state)
    mismatched = {key for key in expected.keys() & state.keys() - head_keys
                  if state[key].shape != expected[key].shape}
    for keys, problem in ((expected.keys() - state.keys(), "is missing"),
                          (state.keys() - expected.keys(), "is not part of the model"),
                          (mismatched, "has another shape")):
        if keys:
            raise BadInput(f"{weights.place}: holds another model than {architecture}: {min(keys)} {problem} "
                           f"({len(keys)} such)")
    for key, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise BadInput(f"{weights.place}: {key} holds NaN or infinite weights; get the file again")
    saved_as = weights.config.get("architecture", architecture)
    if saved_as != architecture:
        say(f"{weights.name}: these are weights of {saved_as}, here in {architecture}")

    labels, wanted = _labels(weights.config), _in_nfc(classes)
    new_head = {key for key in head_keys if state[key].shape != expected[key].shape}
    if labels and labels != wanted:
        # row i of each makes output i
        rows_are_classes = all(isinstance(module, (nn.Linear, nn.Conv2d)) and len(module.weight) == len(classes)
                               for module in map(model.get_submodule, heads))
        if sorted(labels) == sorted(wanted) and not new_head and rows_are_classes:
            rows = torch.tensor([labels.index(label) for label in wanted])
            state = {key: value[rows] if key in head_keys else value for key, value in state.items()}
            say(f"{weights.name}: its {len(labels)} classes are the data's in another order; its head was reordered")
        else:
            new_head = head_keys
    model.load_state_dict({key: value for key, value in state.items() if key not in new_head}, strict=False)
    if new_head:
        other = sorted(set(labels) - set(wanted))[:3]
        reason = f" for other classes ({', '.join(other)}, …)" if other else ""
        before = len(next(state[key] for key in sorted(new_head)))
        say(f"{weights.name}: the head of {before} classes{reason} was replaced by a random one of {len(classes)}")


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` as `model` needs it, by the filter that timm has beside the architecture.

    The filter renames keys of other authors, drops buffers of older versions, and resamples what depends on the size of
    the input. A state that it cannot handle is returned as it is.
    """
    expected = model.state_dict()
    if {key: value.shape for key, value in expected.items()} != {key: value.shape for key, value in state.items()}:
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
        with contextlib.suppress(Exception):    # given another model's weights, a filter may raise anything
            return convert(dict(state), model)
    return state


def _heads(model: nn.Module) -> tuple[str, ...]:
    """The modules that timm declares as classifiers: one as a rule, two in a distilled DeiT."""
    heads = declared(model).get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a config.json declares, one a row of the head; () if it declares none."""
    names = config.get("label_names") or ()
    if isinstance(names, dict):     # from row to name; some rows may have none
        names = [names.get(str(row), "") for row in range(len(names))]
    return _in_nfc(names)


def _in_nfc(names: Any) -> tuple[str, ...]:
    """Names in Unicode NFC, because some systems write é as two characters."""
    return tuple(unicodedata.normalize("NFC", str(name)) for name in names)
