"""All scores of a saved model on any split of a data set:

    python -m kd evaluate runs/demo/student [--dataset leaves] [--split test|validation|train] [--json]

Decoder, cache, precision and batches are those of train.py. On the same machine the scores are equal to the bit.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd import BadInput, models
from kd.data.frames import Data, decode
from kd.data.sources import open_dataset
from kd.machine import console
from kd.machine import runtime as machine
from kd.predict import predict
from kd.scores import scores
from kd.tools import arguments


def dataset_of_run(folder: str) -> str:
    """The `--dataset` of the run that the saved model in `folder` lies in.

    Raises BadInput where the folder is not part of a run.
    """
    config = Path(folder).resolve().parent / "config.json"
    try:
        return json.loads(config.read_text())["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--dataset: say which; {folder} does not lie in the folder of a run") from error


def open_model_and_data(folder: str, dataset: str, seed: int,
                        cache_dir: str) -> tuple[nn.Module, models.Preprocessing, int, Data]:
    """A saved model in eval mode, its preprocessing, its input size, and the data set decoded for it.

    Raises BadInput where either cannot be used, or where their classes differ.
    """
    model, prep, size, classes = models.open_saved(folder)
    opened = open_dataset(dataset, seed, say=_print_to_stderr)
    if opened.classes != classes:
        raise BadInput(f"--dataset {dataset}: its classes ({_first_names(opened.classes)}) are not those of "
                       f"{folder} ({_first_names(classes)}); give the data set that the model was trained on")
    data = decode(opened, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                  cache_dir=cache_dir, say=_print_to_stderr)
    return model, prep, size, data


def _print_to_stderr(line: str) -> None:
    """stdout is for the result."""
    print(line, file=sys.stderr)


def _first_names(classes: tuple[str, ...], most: int = 5) -> str:
    more = f", … {len(classes)} in all" if len(classes) > most else ""
    return ", ".join(classes[:most]) + more


def main(argv: list[str]) -> dict[str, Any]:
    """Prints the scores, and returns them. Raises BadInput, and TrainingFault where the disk is full."""
    parser = arguments.make_parser("evaluate", __doc__)
    arguments.add_data_flags(parser)
    arguments.add_json_flag(parser, "one JSON object instead of tables")
    arguments.add_device_flags(parser)
    args = parser.parse_args(argv)
    dataset = args.dataset or dataset_of_run(args.model)

    runtime = machine.start(args.device, args.amp, "off")
    model, prep, size, data = open_model_and_data(args.model, dataset, args.seed, args.cache_dir)
    split = getattr(data, args.split)
    # the memory format is that of train.py, because another one rounds differently
    model = model.to(runtime.device).to(memory_format=torch.channels_last)
    logits = predict(model, split.frames, prep, size, runtime, args.split)

    result = {"model": args.model, "dataset": dataset, "split": args.split, **scores(logits, split.labels)}
    if args.json:
        print(json.dumps(result))
    else:
        print(console.confusion_table(result["confusion"], data.classes))
        print(f"{args.model} on {args.split} of {dataset}: {100 * result['accuracy']:.1f} % "
              f"({result['correct']}/{result['total']}), macro-F1 {result['macro_f1']:.3f}, "
              f"loss {result['loss']:.3f}, calibration error {result['calibration_error']:.3f}")
    return result
