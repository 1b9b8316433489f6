"""All scores of a saved model on any split of a data set:

    python -m kd evaluate runs/demo/student [--dataset leaves] [--split test|validation|train] [--json]

Decoder, cache, precision and batches are those of train.py. On the same machine the scores of student and control are
those of the run to the bit, and those of the teacher nearly so: the run folds its BatchNorm into the convolutions.
Another data set needs no more than the split that is asked for, and may lack some of the model's classes.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
from torch import nn

from kd import BadInput, models
from kd.data.frames import Split, decode_splits
from kd.data.samples import Dataset, Reading, first_names
from kd.data.sources import hub_id, open_splits
from kd.data.splits import split_digest
from kd.machine import console, runtime
from kd.predict import predict
from kd.scores import scores
from kd.tools import arguments


class Opened(NamedTuple):
    """A saved model and the pictures that are decoded for it."""

    model: nn.Module                # in eval mode
    prep: models.Preprocessing
    size: int                       # of its input, in pixels
    classes: tuple[str, ...]
    dataset: str                    # as --dataset names it
    splits: dict[str, Split]
    split_of_run: bool | None       # whether --split holds the pictures that it had in the run; None: not known


def open_model_and_data(args: argparse.Namespace, splits: Sequence[str]) -> Opened:
    """What the flags of `arguments.add_data_flags` name, and these splits of the data set.

    Raises BadInput where model or data cannot be used, and where the data have a class that the model does not know.
    """
    model, prep, size, classes = models.open_saved(args.model)
    settings = settings_of_run(args.model)
    name = args.dataset or settings.get("dataset")
    if not name:
        raise BadInput(f"--dataset: say which; {args.model} does not lie in the folder of a run")

    dataset, split_of_run = open_dataset_of_run(name, splits, classes, args, settings)
    decoded = decode_splits(dataset, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                            cache_dir=args.cache_dir, say=_print_to_stderr)
    return Opened(model, prep, size, classes, name, decoded, split_of_run)


# ---- the run that the model lies in ----------------------------------------------------------------------------

def settings_of_run(folder: str) -> dict[str, Any]:
    """config.json of the run that the saved model in `folder` is part of; empty where it is part of none."""
    try:
        settings = json.loads((Path(folder).resolve().parent / "config.json").read_text("utf-8"))
        # another program's file of that name may stand there
        return settings if isinstance(settings["dataset"], str) and isinstance(settings.get("data", {}), dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def open_dataset_of_run(name: str, splits: Sequence[str], classes: tuple[str, ...], args: argparse.Namespace,
                        settings: dict[str, Any]) -> tuple[Dataset, bool | None]:
    """The splits of a data set, and whether `args.split` holds the pictures that it had in the run.

    The data set of the run is read as the run read it, and lacking splits are carved from train as there. Where the
    pictures of `args.split` are not, or may not be, those that the run kept aside, a line on stderr says so. Raises
    BadInput.
    """
    recorded = settings.get("data", {}).get("splits", {})      # older runs have no such record
    digest = recorded.get(args.split, {}).get("digest")
    carved = any(split["carved"] for split in recorded.values())
    reading_of_run = _reading(args, settings)
    own = bool(settings) and _place(name) == _place(settings["dataset"])
    if not own and carved:
        # A copy in another place is known by its pictures. Without their split they would all be taken for the test.
        with contextlib.suppress(BadInput):
            copy = open_splits(name, splits, classes, reading_of_run, carve=True, say=lambda line: None)
            own = digest == split_digest(copy.splits[args.split], classes)

    dataset = open_splits(name, splits, classes, reading_of_run if own else _reading(args, {}),
                          carve=own and (carved or not recorded), say=_print_to_stderr)
    if not own:
        return dataset, None
    trained = "" if args.split == "train" else "; the model may have been trained on some of these pictures"
    if digest is None:
        if args.split in dataset.carved:
            _print_to_stderr(f"{name}: this {args.split} split may not be the one that the run kept aside, since an "
                             f"older version of kd chose it{trained}")
        return dataset, None
    same = digest == split_digest(dataset.splits[args.split], classes)
    if not same:
        _print_to_stderr(f"{name}: this is not the {args.split} split that the run had, since pictures or labels have "
                         f"changed{trained}")
    return dataset, same


def _reading(args: argparse.Namespace, settings: dict[str, Any]) -> Reading:
    """The flags that say how to read a data set; where one is not given, the setting of the run."""
    values: dict[str, Any] = {}
    for field in ("config", "image", "label", "follow_links"):
        given = getattr(args, field)
        values[field] = settings.get(field, Reading._field_defaults[field]) if given is None else given
    return Reading(**values)


def _place(name: str) -> str:
    """The same for two names of one data set."""
    return name if name == "leaves" else hub_id(name) or str(Path(name).expanduser().resolve())


def _print_to_stderr(line: str) -> None:
    """stdout is for the result."""
    print(line, file=sys.stderr)


# ---- the command -----------------------------------------------------------------------------------------------

def main(argv: list[str]) -> dict[str, Any]:
    """Prints the scores, and returns them. Raises BadInput, and TrainingFault where the disk is full."""
    parser = arguments.make_parser("evaluate", __doc__)
    arguments.add_data_flags(parser)
    arguments.add_json_flag(parser, "one JSON object instead of tables")
    arguments.add_device_flags(parser)
    args = parser.parse_args(argv)

    machine = runtime.start(args.device, args.amp, "off")
    opened = open_model_and_data(args, [args.split])
    split = opened.splits[args.split]
    # the memory format is that of train.py, because another one rounds differently
    model = opened.model.to(machine.device).to(memory_format=torch.channels_last)
    logits = predict(model, split.frames, opened.prep, opened.size, machine, args.split)

    result = {"model": args.model, "dataset": opened.dataset, "split": args.split,
              "split_of_run": opened.split_of_run, **scores(logits, split.labels)}
    absent = [name for name, row in zip(opened.classes, result["confusion"], strict=True) if not sum(row)]
    result["classes_without_pictures"] = absent
    if args.json:
        print(json.dumps(result))
    else:
        print(console.confusion_table(result["confusion"], opened.classes))
        if absent:
            print(f"without a picture in {args.split}: {len(absent):,} of {len(opened.classes):,} classes "
                  f"({first_names(absent)}); macro-F1 is over the classes that are true or predicted")
        print(f"{args.model} on {args.split} of {opened.dataset}: {100 * result['accuracy']:.1f} % "
              f"({result['correct']}/{result['total']}), macro-F1 {result['macro_f1']:.3f}, "
              f"loss {result['loss']:.3f}, calibration error {result['calibration_error']:.3f}")
    return result
