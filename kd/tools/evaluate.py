"""All the scores of a saved model on any split of a data set:

    python -m kd evaluate runs/demo/student [--dataset leaves] [--split test|validation|train] [--json]

Decoder, cache, precision and batches are those of train.py, and so on one machine are the numbers.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd import BadInput, cli, models
from kd.machine import console, runtime
from kd.data.sources import open_dataset
from kd.data.frames import Data, decode
from kd.predict import predict
from kd.scores import scores

SPLITS = ("train", "validation", "test")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model, and which pictures."""
    parser.add_argument("model", metavar="PATH", help="folder that train.py saved, such as runs/demo/student")
    parser.add_argument("--dataset", default="", help="leaves, a Hub dataset id, or a folder, as for train.py "
                        "(default: that of the run which PATH lies in)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--cache-dir", default=cli.CACHE_DIR, help="where decoded images are kept")
    parser.add_argument("--seed", type=int, default=0, help="the run's; it carves missing splits (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def dataset_of(folder: str) -> str:
    """The `--dataset` of the run in whose folder a saved model lies. Raises BadInput where it lies elsewhere."""
    try:
        return json.loads((Path(folder).resolve().parent / "config.json").read_text())["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--dataset: say which; {folder} does not lie in the folder of a run") from error


def open_both(folder: str, dataset: str, seed: int, cache_dir: str,
              ) -> tuple[nn.Module, models.Preprocessing, int, Data]:
    """A saved model in eval mode, its preprocessing and input size, and the data set decoded as it wants it.

    Raises BadInput where either cannot be used, or where their classes differ.
    """
    model, prep, size, classes = models.open_saved(folder)
    opened = open_dataset(dataset, seed, say=_to_stderr)
    if opened.classes != classes:
        raise BadInput(f"--dataset {dataset}: its classes ({_short(opened.classes)}) are not those of {folder} "
                       f"({_short(classes)}); give the data set that the model was trained on")
    return model, prep, size, decode(opened, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                                     cache_dir=cache_dir, say=_to_stderr)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)  # stdout is for the result


def _short(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:5]) + (f", … {len(classes)} in all" if len(classes) > 5 else "")


def main(argv: list[str]) -> dict[str, Any]:
    """Prints the scores, and returns them. Raises BadInput, and TrainingFault for a full disk."""
    parser = cli.OneLineParser(prog="python -m kd evaluate", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="default: auto, as in "
                        "training; another precision may move a picture near the border")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or dataset_of(args.model)
    run = runtime.start(args.device, args.amp, "off")
    model, prep, size, data = open_both(args.model, args.dataset, args.seed, args.cache_dir)
    split = getattr(data, args.split)
    placed = model.to(run.device).to(memory_format=torch.channels_last)  # as train.py has it, to the last bit
    logits = predict(placed, split.frames.read, len(split), prep, size, run, args.split)
    result = {"model": args.model, "dataset": args.dataset, "split": args.split, **scores(logits, split.labels)}
    if args.json:
        print(json.dumps(result))
    else:
        print(console.confusion_table(result["confusion"], data.classes))
        print(f"{args.model} on {args.split} of {args.dataset}: {100 * result['accuracy']:.1f} % "
              f"({result['correct']}/{result['total']}), macro-F1 {result['macro_f1']:.3f}, loss {result['loss']:.3f}, "
              f"calibration error {result['calibration_error']:.3f}")
    return result
