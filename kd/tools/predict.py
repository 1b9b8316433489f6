"""What a saved model sees in pictures:

    python -m kd predict runs/demo/student IMAGE|FOLDER ... [--top 3] [--json]

The pictures go the way of validation and test: the same decoder, resize, centre crop, normalisation and precision.
A folder counts as in training: every file in it is a picture, whatever its name, but for hidden files and the like.
Files that cannot be predicted are named at the end, and the exit status is then 2.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kd import BadInput, models
from kd.data.decoding import frame_of
from kd.data.readers import printable, visible
from kd.machine import console, runtime
from kd.predict import BATCH, predict_batch
from kd.scores import softmax
from kd.tools import arguments


def files_below(path: Path) -> Iterator[Path]:
    """Every visible file below a folder, sorted. What is no folder, or cannot be listed, is given as it is."""
    try:
        inside = [Path(entry.path) for entry in visible(path)]
    except OSError:
        yield path
        return
    for each in inside:
        # a link is not followed, since it may lead in a circle; reading one to a folder says what it is
        yield from [each] if each.is_symlink() else files_below(each)


def read_batches(files: list[Path], size: int, prep: models.Preprocessing,
                 faults: list[str]) -> Iterator[tuple[list[Path], np.ndarray]]:
    """The files that are pictures, and their frames, uint8 `(B, R, R, 3)`. The others become lines in `faults`.

    Every batch but the last is full, because in float32 the number of rows may change a probability by 1e-7. So a bad
    file changes nothing for the others.
    """
    pictures: list[Path] = []
    frames: list[np.ndarray] = []
    for path in files:
        name = printable(str(path))
        try:
            frames.append(frame_of(path.read_bytes(), name, size, math.floor(size / prep.crop_pct), prep.interpolation))
            pictures.append(path)
        except BadInput as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{name}: {error.strerror}; give an image that can be read")
        if len(frames) == BATCH:
            yield pictures, np.stack(frames)
            pictures, frames = [], []
    if frames:
        yield pictures, np.stack(frames)


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Prints, and returns, one row a picture. Raises BadInput, but only after the rows of all good pictures."""
    parser = arguments.make_parser("predict", __doc__)
    parser.add_argument("model", help="folder that train.py saved, such as runs/demo/student")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", type=Path)
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default: 3)")
    arguments.add_json_flag(parser, "one JSON object a picture")
    arguments.add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.top < 1:
        raise BadInput(f"--top {args.top}: must be at least 1")

    files = [file for path in args.images for file in files_below(path)]
    if not files:
        raise BadInput(f"{args.images[0]}: holds no picture; give an image or a folder of images")
    width = max(len(printable(str(path))) for path in files)

    machine = runtime.start(args.device, args.amp, "off")
    classifier = models.open_saved(args.model, machine)
    classes = classifier.classes
    faults: list[str] = []
    rows: list[dict[str, Any]] = []
    with console.progress(len(files), "predicting") as bar:
        for pictures, frames in read_batches(files, classifier.size, classifier.prep, faults):
            logits = predict_batch(classifier, frames).cpu().numpy()
            for path, probabilities in zip(pictures, softmax(logits), strict=True):
                best = np.argsort(-probabilities, kind="stable")[:args.top]
                row = {"file": printable(str(path)),
                       "top": [{"class": classes[i], "probability": float(probabilities[i])} for i in best]}
                rows.append(row)
                # above the bar, where both are on one terminal
                bar.write(json.dumps(row) if args.json else f"{row['file']:{width}}  " + "  ".join(
                    f"{classes[i]} {100 * probabilities[i]:.1f} %" for i in best))
            sys.stdout.flush()      # a pipe sees the rows now, and not at the end
            bar.update(len(pictures))
    if len(faults) == 1:
        raise BadInput(faults[0])
    if faults:
        raise BadInput(f"{len(faults):,} files could not be predicted; pictures predicted: {len(rows):,}\n  "
                       + "\n  ".join(faults))
    return rows
