"""Weights from a file, a saved folder or a Hub repository, and how they fit a model.

Everything that timm reads is read here, by timm. What differs from timm: weights of another model are
refused, never left random in part, and the classes that a folder declares are compared with the data's.
"""

import contextlib
import importlib
import unicodedata
import warnings
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple
from unittest import mock

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


# Reading

def path_of(flag: str, weights: str) -> Path:
    """The file that `weights`, a file or a saved folder, stands for. Raises BadInput where there is none."""
    path = Path(weights).expanduser()
    if path.is_dir():
        path = next((path / name for name in FILE_NAMES if (path / name).is_file()), path / FILE_NAMES[0])
    if not path.is_file():
        raise BadInput(f"--{flag}-weights {weights}: no such file; use imagenet, none, a weights file such as "
                       f".safetensors, or a folder with {FILE_NAMES[0]}")
    return path


def read(path: Path) -> Weights:
    """A weights file, with the config.json beside it if it has the name of a saved folder's weights.

    A state dict may lie below the keys that timm knows, such as `state_dict` or `model_ema`. Raises
    BadInput for a file that is damaged, holds no weights, or needs code to be opened.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = timm.models.load_state_dict(str(path))    # a pickle: by torch.load(weights_only=True)
        state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # given damaged bytes, the readers raise nearly anything
        if path.suffix == ".safetensors":
            raise BadInput(f"{path}: not a readable safetensors file ({one_line(error)}); get it again") from error
        if "unsupported global" in str(error.__cause__).lower() or "TorchScript" in str(error):
            raise BadInput(f"{path}: opening it would run code that it holds; save its state dict alone, best with "
                           f"safetensors.torch.save_file") from error
        raise BadInput(f"{path}: not a readable weights file; get it again") from error
    if not state:
        raise BadInput(f"{path}: holds no weights; give a state dict, as torch and safetensors save it")

    if path.name not in FILE_NAMES or not (path.parent / "config.json").is_file():
        return Weights(str(path), path.name, state, {})
    name = path.resolve().parent.name
    load_config = private_of_timm("_hub", "load_model_config_from_path")
    try:
        config, architecture, _ = load_config(path.parent)
    except KeyError:            # the config.json of another library
        return Weights(str(path), name, state, {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path.parent}/config.json: not readable ({one_line(error)}); get it again") from error
    return Weights(str(path), name, state, {**config, "architecture": architecture})


def private_of_timm(module: str, name: str) -> Any:
    """A function that timm does not export. Raises BadInput where another version of timm lacks it."""
    try:
        return getattr(importlib.import_module(f"timm.models.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"timm {timm.__version__} has no {module}.{name}, which these weights need to be loaded; "
                       f"pip install timm==1.0.31") from error


def read_repository(repository: str) -> Weights:
    """The weights and config.json of a Hub repository, through timm's download and with its exceptions."""
    config, architecture, _ = timm.models.load_model_config_from_hf(repository)
    state = timm.models.load_state_dict_from_hf(repository)
    return Weights(repository, repository, state, {**config, "architecture": architecture})


# Loading

def load(model: nn.Module, weights: Weights, name: str, arguments: Mapping[str, Any], classes: tuple[str, ...],
         say: Callable[[str], None]) -> None:
    """Load `weights` into `model`, which timm made of `name` and `arguments`, with an output per class.

    The head stays as it is, random, where its weights have another shape or other classes. All other
    weights must fit. Raises BadInput for weights of another model, and for NaN or infinite ones.
    """
    architecture = declared(model)["architecture"]
    expected = model.state_dict()
    state = _convert(model, weights.state, name, arguments)
    heads = _head_keys(model)
    missing, unknown, mismatched = _differences(expected, state, heads)
    for keys, problem in ((missing, "is missing"), (unknown, "is not part of the model"),
                          (mismatched, "has another shape")):
        if keys:
            raise BadInput(f"{weights.place}: holds another model than {architecture}: {min(keys)} {problem} "
                           f"({len(missing)} missing, {len(unknown)} unknown, {len(mismatched)} of another shape)")
    for key, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise BadInput(f"{weights.place}: {key} holds NaN or infinite weights; get the file again")
    saved_as = weights.config.get("architecture", architecture)
    if saved_as != architecture:
        say(f"{weights.name}: these are weights of {saved_as}, here in {architecture}")

    labels, wanted = _labels(weights.config), _in_nfc(classes)
    random_head, reason = {key for key in heads if state[key].shape != expected[key].shape}, ""
    if labels and labels != wanted:
        if sorted(labels) == sorted(wanted) and not random_head and _rows_are_classes(model, len(classes)):
            rows = torch.tensor([labels.index(label) for label in wanted])
            state = {key: value[rows] if key in heads else value for key, value in state.items()}
            say(f"{weights.name}: its {len(labels)} classes are the data's in another order; its head was reordered")
        else:
            random_head, reason = heads, f"its classes are not the data's ({_contrast(labels, wanted)}); "

    model.load_state_dict({key: value for key, value in state.items() if key not in random_head}, strict=False)
    for key in sorted(random_head):
        if key.endswith("weight"):
            say(f"{weights.name}: {reason}the head of {len(state[key])} classes was replaced by a random one of "
                f"{len(expected[key])}")


def _convert(model: nn.Module, state: dict[str, Tensor], name: str, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """`state` as `model` needs it, by the filter through which timm passes weights of this architecture.

    The filter renames keys of other authors, drops buffers of older versions, and resamples what
    depends on the size of the input. A state that it cannot handle is returned as it is.
    """
    expected = model.state_dict()
    if not any(_differences(expected, state, _head_keys(model))):
        return state
    # timm's builder hands the filter to the function that loads weights, and to nothing else.
    private_of_timm("_builder", "load_pretrained")
    with mock.patch("timm.models._builder.load_pretrained") as loader, torch.device("meta"):
        timm.create_model(name, pretrained=True, **arguments)
    given = loader.call_args.kwargs if loader.called else {}
    if not {"filter_fn", "strict"} <= given.keys():
        raise BadInput(f"timm {timm.__version__} does not say how it converts weights, which these need; "
                       f"pip install timm==1.0.31")
    convert, strict = given["filter_fn"], given["strict"]
    if convert:
        with contextlib.suppress(Exception):    # given another model's weights, a filter may raise anything
            try:
                state = convert(dict(state), model)
            except TypeError:                   # some take the weights alone
                state = convert(dict(state))
    # Published files of some architectures have layers that timm left out. It then takes what it knows.
    return state if strict else {key: value for key, value in state.items() if key in expected}


def _differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor],
                 heads: set[str]) -> tuple[set[str], set[str], set[str]]:
    """The keys that are missing, that are unknown, and those outside the heads that have another shape."""
    return (expected.keys() - state.keys(), state.keys() - expected.keys(),
            {key for key in expected.keys() & state.keys() - heads if state[key].shape != expected[key].shape})


# Heads and their classes

def _heads(model: nn.Module) -> tuple[str, ...]:
    """The modules that timm declares as classifiers: one as a rule, two in a distilled DeiT."""
    heads = declared(model).get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _head_keys(model: nn.Module) -> set[str]:
    prefixes = tuple(f"{head}." for head in _heads(model))
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def _rows_are_classes(model: nn.Module, classes: int) -> bool:
    """Whether row i of every head makes output i, as in a linear layer and in a 1 × 1 convolution."""
    modules = [model.get_submodule(head) for head in _heads(model)]
    return all(isinstance(module, (nn.Linear, nn.Conv2d)) and len(module.weight) == classes for module in modules)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a config.json declares, one a row of the head; () if it declares none."""
    names = config.get("label_names") or ()
    if isinstance(names, dict):     # from row to name; some rows may have none
        names = [names.get(str(row), "") for row in range(len(names))]
    return _in_nfc(names)


def _in_nfc(names: Any) -> tuple[str, ...]:
    """Names in Unicode NFC, because some systems write é as two characters."""
    return tuple(unicodedata.normalize("NFC", str(name)) for name in names)


def _contrast(labels: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    """Some names that only one of the two has."""
    parts = []
    for where, names in (("only there", set(labels) - set(wanted)), ("only in the data", set(wanted) - set(labels))):
        if names:
            parts.append(f"{where}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}")
    return "; ".join(parts) or "in another number"
