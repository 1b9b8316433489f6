"""What a saved model sees in pictures:

    python -m kd predict runs/demo/student IMAGE|FOLDER ... [--top 3] [--json]

The pictures go the way of validation and test: the same decoder, resize, centre crop, normalisation and precision.
A folder counts as in training: every file in it is a picture, whatever its name, but for hidden files and the like.
Files that cannot be predicted are named at the end, and the exit status is then 2.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd import BadInput, models
from kd.data.decoding import encoded_frame
from kd.data.samples import printable, visible
from kd.machine import console, runtime
from kd.predict import BATCH, predict_batch
from kd.scores import softmax
from kd.tools import arguments

MOST_FAULTS = 20    # that are named one by one


def find_files(names: list[str], faults: list[str]) -> list[Path]:
    """Files as given, and every file below a folder, sorted. A folder without any becomes a line in `faults`."""
    files: list[Path] = []
    for path in map(Path, names):
        below = list(_files_below(path))
        files += below
        if not below:
            faults.append(f"{printable(str(path))}: holds no picture; give an image or a folder of images")
    return files


def _files_below(path: Path) -> Iterator[Path]:
    """`path`, or all that it holds if it is a folder, without junk.

    A link to a folder is not followed, since it may lead in a circle. Such a link, and a folder that cannot be listed,
    is given as if it were a file, so that `read_frame` says what is wrong with it.
    """
    try:
        inside = visible(path) if os.path.isdir(path) else [path]
    except OSError:
        inside = [path]
    for each in inside:
        if each != path and os.path.isdir(each) and not os.path.islink(each):
            yield from _files_below(each)
        else:
            yield each


def read_frame(path: Path, size: int, prep: models.Preprocessing) -> np.ndarray:
    """A picture as validation and test see it before the crop, uint8 `(R, R, 3)`. Raises BadInput, naming the file."""
    name = printable(str(path))
    if os.path.isdir(path):
        raise BadInput(f"{name}: a link to a folder is not followed; name that folder itself" if os.path.islink(path)
                       else f"{name}: the folder cannot be read; give it the permission")
    if os.path.exists(path) and not os.path.isfile(path):   # reading a pipe could wait for ever
        raise BadInput(f"{name}: neither a file nor a folder; give an image")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}; give an image that can be read") from error
    return encoded_frame(content, name, size, math.floor(size / prep.crop_pct), prep.interpolation)


def read_batches(files: list[Path], size: int, prep: models.Preprocessing,
                 faults: list[str]) -> Iterator[tuple[list[Path], np.ndarray]]:
    """The files that are pictures, and their frames, uint8 `(B, R, R, 3)`. The others become lines in `faults`.

    Every batch but the last is full, because in float32 the number of rows may change a probability by 1e-7. So a bad
    file changes nothing for the others.
    """
    pictures: list[Path] = []
    frames: list[np.ndarray] = []
    for path in files:
        try:
            frames.append(read_frame(path, size, prep))
            pictures.append(path)
        except BadInput as error:
            faults.append(" ".join(str(error).split()))     # one line
        if len(frames) == BATCH:
            yield pictures, np.stack(frames)
            pictures, frames = [], []
    if frames:
        yield pictures, np.stack(frames)


def raise_if_any(faults: list[str], total: int) -> None:
    """Name the files that could not be predicted on stderr, then raise BadInput."""
    if len(faults) == 1:
        raise BadInput(faults[0])
    if faults:
        print("\n".join(faults[:MOST_FAULTS]), file=sys.stderr)
        named = "named above" if len(faults) <= MOST_FAULTS else f"of which the first {MOST_FAULTS} are named above"
        raise BadInput(f"{len(faults):,} files or folders could not be predicted, {named}; "
                       f"pictures predicted: {total:,}")


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Prints, and returns, one row a picture. Raises BadInput, but only after the rows of all good pictures."""
    parser = arguments.make_parser("predict", __doc__)
    parser.add_argument("model", help="folder that train.py saved, such as runs/demo/student")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default: 3)")
    arguments.add_json_flag(parser, "one JSON object a picture")
    arguments.add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.top < 1:
        raise BadInput(f"--top {args.top}: must be at least 1")

    machine = runtime.start(args.device, args.amp, "off")
    model, prep, size, classes = models.open_saved(args.model)
    # the memory format is that of train.py, because another one rounds differently
    model = model.to(machine.device).to(memory_format=torch.channels_last)

    faults: list[str] = []
    files = find_files(args.images, faults)
    width = max((len(printable(str(path))) for path in files), default=0)
    rows: list[dict[str, Any]] = []
    with console.progress(len(files), "predicting") as bar:
        for pictures, frames in read_batches(files, size, prep, faults):
            logits = predict_batch(model, frames, prep, size, machine).cpu().numpy()
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
    raise_if_any(faults, len(rows))
    return rows
