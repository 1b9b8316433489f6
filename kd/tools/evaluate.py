"""All scores of a saved model on any split of a data set:

    python -m kd evaluate runs/demo/student [--dataset leaves] [--split test|validation|train] [--json]

Decoder, cache, precision and batches are those of train.py. On the same machine the scores of student and control are
those of the run to the bit, and those of the teacher nearly so: the run folds its BatchNorm into the convolutions.
Another data set needs no more than the split that is asked for, and may lack some of the model's classes. Macro-F1 is
over the classes that are true or predicted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Sequence

from kd import BadInput, models
from kd.data.frames import Split, decode
from kd.data.table import Table, open_splits
from kd.machine import console, runtime
from kd.predict import predict
from kd.models import Classifier
from kd.scores import confusions, scores
from kd.tools import arguments


def open_data(args: argparse.Namespace, names: Sequence[str],
              classifier: Classifier) -> tuple[dict[str, Split], dict[str, Any]]:
    """These splits of the data set that the flags name, and what the result says of it.

    Pictures say whether `args.split` is that of the run, because a copy may lie elsewhere. If the run carved a split,
    the same one is carved here. A data set that then has other pictures is a new one, and opened as it is. Where the
    pictures are not those of the run, a line on stderr says so. Raises BadInput where they cannot be used.
    """
    run = settings_of_run(args.model)
    name = args.dataset or run.get("dataset")
    if not name:
        raise BadInput(f"--dataset: say which; {args.model} does not lie in the folder of a run")
    recorded = run["data"]["splits"] if run else {}
    own = {} if args.dataset else run       # the columns of the run are those of its own data set
    reading = {key: getattr(args, key) or own.get(key, "") for key in ("config", "image", "label")}

    def is_of_run(table: Table) -> bool:
        return table.split_digest(args.split) == recorded[args.split]["digest"]

    carve = any(split["carved"] for split in recorded.values())
    if carve and args.dataset:
        try:
            carve = is_of_run(open_splits(name, names, classifier.classes, carve=True, say=lambda line: None,
                                          **reading))
        except BadInput:
            carve = False
    table = open_splits(name, names, classifier.classes, carve=carve, say=say, **reading)
    split_of_run = is_of_run(table) if run else None
    if split_of_run is False:
        say(f"{name}: these are not the {args.split} pictures of the run; the model may have been trained on some of "
            f"them")
    prep = classifier.prep
    decoded = decode(table, size=classifier.size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                     cache_dir=args.cache_dir, say=say)
    return decoded, {"model": args.model, "dataset": name, "split": args.split, "split_of_run": split_of_run}


def settings_of_run(folder: str) -> dict[str, Any]:
    """config.json of the run that the saved model in `folder` is part of; empty where it is part of none."""
    try:
        settings = json.loads((Path(folder).resolve().parent / "config.json").read_text("utf-8"))
        return settings if settings["data"]["splits"] else {}
    except (OSError, ValueError, KeyError, TypeError):      # TypeError: another program's file of that name
        return {}


def say(line: str) -> None:
    """stdout is for the result."""
    print(line, file=sys.stderr)


def main(argv: list[str]) -> dict[str, Any]:
    """Prints the scores, and returns them. Raises BadInput, and TrainingFault where the disk is full.

    `mistakes` has [true class, predicted class, count] of each kind of mistake, the most frequent first.
    """
    parser = arguments.make_parser("evaluate", __doc__)
    arguments.add_data_flags(parser)
    arguments.add_json_flag(parser, "one JSON object instead of tables")
    arguments.add_device_flags(parser)
    args = parser.parse_args(argv)

    machine = runtime.start(args.device, args.amp, "off")
    classifier = models.open_saved(args.model, machine)
    splits, about = open_data(args, [args.split], classifier)
    split, classes = splits[args.split], classifier.classes
    logits = predict(classifier, split, args.split)
    pairs = confusions(split.labels, logits.argmax(axis=1))
    result = {**about, **scores(logits, split.labels),
              "mistakes": [[classes[true], classes[other], count] for true, other, count in pairs if true != other]}
    if args.json:
        print(json.dumps(result))
    else:
        print(console.confusion_table(pairs, classes))
        print(f"{result['model']} on {result['split']} of {result['dataset']}: {100 * result['accuracy']:.1f} % "
              f"({result['correct']}/{result['total']}), macro-F1 {result['macro_f1']:.3f}, "
              f"loss {result['loss']:.3f}, calibration error {result['calibration_error']:.3f}")
    return result
