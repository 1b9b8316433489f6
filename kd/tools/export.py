"""A saved model as one ONNX file that runs without this code, checked against PyTorch on real pictures:

    python -m kd export runs/demo/student [--dataset leaves] [--int8] [--split test] [--out FILE] [--json]

The graph goes from `pixels`, uint8 RGB `(B, 3, size, size)` of any B, to `logits`, float32 `(B, C)`. Normalisation is
inside, so that nobody can get mean and std wrong. The caller turns a picture upright, lays transparent parts over
white, resizes and crops, as the file's metadata says: input, labels, size, resize, interpolation.

--int8: static quantisation, QDQ, calibrated on pictures of train.

Everything is computed on the CPU in float32. A float export whose logits differ from PyTorch's is refused, and so is an
int8 export that is less accurate.
"""

import json
import logging
import math
import os
import statistics
import tempfile
import timeit
import warnings
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from kd import BadInput, TrainingFault, models, one_line
from kd.data.frames import Split, center_crop
from kd.machine import runtime
from kd.machine.files import sync
from kd.models import Classifier
from kd.predict import predict
from kd.scores import SIGNIFICANCE, compare_paired
from kd.tools import arguments
from kd.tools.evaluate import open_data

BATCH = 32
# Pictures of train. On three trained MobileNetV2, 64 changed an answer or two of 128, and 1000 none. With 256, neither
# entropy nor percentiles were better than the plain minimum and maximum.
CALIBRATION_PICTURES = 256
LARGEST_LOSS = 0.02     # of accuracy, by int8
TOLERANCE = 1e-4        # of the largest logit, or of 1 if that is larger: float32 sums in another order
ROUNDS = 50             # of the latency


def read_pixels(split: Split, samples: np.ndarray, size: int) -> np.ndarray:
    """uint8 `(B, 3, size, size)`, contiguous: the input of the exported graph."""
    return np.ascontiguousarray(center_crop(split.read(samples), size).transpose(0, 3, 1, 2))


# ---- the graph --------------------------------------------------------------------------------------------------

def write_onnx(module: models.FromPixels, size: int, file: Path) -> None:
    """By torch's exporter. Raises TrainingFault for a network that it cannot convert."""
    # two pictures, because the exporter would take a batch of one for a constant
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations inside of torch's exporter
            torch.onnx.export(module, (example,), file, dynamo=True, verbose=False, external_data=False,
                              input_names=["pixels"], output_names=["logits"],
                              dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:      # each stage of the exporter has its own
        raise TrainingFault(f"{models.architecture(module.model)} cannot be exported: {one_line(error)}") from error


def quantize(file: Path, split: Split, size: int) -> None:
    """Replace the ONNX graph in `file` by its int8 twin, calibrated on pictures of `split`.

    Weights have 7 bits and a scale per channel. Of a scale per tensor, an EfficientNet-lite0 lost 17 points. With 8
    bits, sums of products overflow where a CPU lacks VNNI, and a channel whose weights are nearly zero, as MobileNetV3
    has them, gets a bias beyond int32, which onnxruntime mends only for signed weights.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
    # evenly over the split, so that every class is met where samples are sorted by class
    samples = np.linspace(0, len(split) - 1, min(CALIBRATION_PICTURES, len(split))).astype(int)
    inputs = ({"pixels": read_pixels(split, samples[i:i + 1], size)} for i in range(len(samples)))

    class Pictures(quantization.CalibrationDataReader):
        """onnxruntime asks for one input after another, until there is none."""

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(inputs, None)

    prepared = file.with_name("prepared.onnx")
    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)  # quantisation needs all shapes
    quantization.quantize_static(
        str(prepared), str(file), Pictures(), quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        per_channel=True, reduce_range=True, calibrate_method=quantization.CalibrationMethod.MinMax)


def describe(file: Path, classifier: Classifier) -> None:
    """Put the metadata into the file: the classes, and what the caller does to a picture."""
    import onnx
    model, prep, size, classes, _ = classifier
    side = math.floor(size / prep.crop_pct)
    proto = onnx.load(file)
    onnx.helper.set_model_props(proto, {
        "architecture": models.architecture(model), "labels": json.dumps(classes), "size": str(size),
        "resize": str(side), "interpolation": prep.interpolation,
        "input": "RGB, upright (EXIF orientation applied), transparent parts over white, the shorter side resized to "
                 f"{side} pixels ({prep.interpolation}), then the central {size} x {size} pixels"})
    onnx.save(proto, file)


def open_graph(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function from uint8 `(B, 3, size, size)` to float32 `(B, C)` that onnxruntime computes on the CPU."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()      # those of PyTorch, beside which it is timed
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"pixels": pixels})[0]


# ---- the check ------------------------------------------------------------------------------------------------

def compare(pytorch: np.ndarray, exported: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Two models' logits `(N, C)`: how often each is right and both agree, and how far they differ at most.

    Where a logit is NaN, so is `max_difference`. `p` says how likely chance alone would make as large a difference of
    the accuracies. `largest_logit` is at least 1.
    """
    answers, theirs = pytorch.argmax(1), exported.argmax(1)
    return {"total": len(labels), "pytorch_correct": int((answers == labels).sum()),
            "correct": int((theirs == labels).sum()), "agree": int((answers == theirs).sum()),
            "p": compare_paired(pytorch, exported, labels)["p"],
            "max_difference": float(np.abs(pytorch - exported).max()),
            "largest_logit": max(1.0, float(np.abs(pytorch).max()))}


def refuse(result: dict[str, Any], int8: bool) -> None:
    """Raise TrainingFault for a float graph whose logits are not PyTorch's, or an int8 one that is less accurate.

    int8 may lose LARGEST_LOSS, or what may be chance. On 30 pictures, two points are less than one picture.
    """
    total = result["total"]
    if int8:
        loss = (result["pytorch_correct"] - result["correct"]) / total
        if loss > LARGEST_LOSS and result["p"] <= SIGNIFICANCE:
            raise TrainingFault(f"--int8: {100 * result['correct'] / total:.1f} % of {result['split']} where PyTorch "
                                f"has {100 * result['pytorch_correct'] / total:.1f} %; {result['file']} was not "
                                f"written; export without --int8")
    elif not result["max_difference"] <= TOLERANCE * result["largest_logit"]:   # `not <=` is also true for a NaN
        raise TrainingFault(f"logits differ from PyTorch's by {result['max_difference']:.1e} "
                            f"({result['agree']}/{total} answers agree); {result['file']} was not written")


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of ROUNDS calls, after five that warm up."""
    return 1000 * statistics.median(timeit.repeat(call, number=1, repeat=5 + ROUNDS)[5:])


def format_table(result: dict[str, Any]) -> str:
    """The exported model below the one in PyTorch."""
    total = result["total"]

    def row(name: str, prefix: str) -> str:
        correct = result[f"{prefix}correct"]
        share = f"{100 * correct / total:.1f} % ({correct}/{total})"
        return f"{name:20} {result[f'{prefix}bytes'] / 1e6:6.2f} MB {result[f'{prefix}ms']:7.2f} ms {share:>22}"

    accuracy = f"accuracy, {result['split']}"
    same = f"{100 * result['agree'] / total:.1f} % ({result['agree']}/{total})"
    return "\n".join([
        f"{'':20} {'size':>9} {'batch 1':>10} {accuracy:>22} {'same answer':>18} {'max difference':>15}",
        row("PyTorch, float32", "pytorch_"),
        f"{row(result['format'], '')} {same:>18} {result['max_difference']:>15.1e}"])


# ---- the command ------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> dict[str, Any]:
    """Writes the file, prints the comparison with PyTorch, and returns it.

    Raises BadInput, and TrainingFault for a network that cannot be exported and for an export that is refused.
    """
    parser = arguments.make_parser("export", __doc__)
    arguments.add_data_flags(parser)
    parser.add_argument("--to", choices=("onnx",), default="onnx", help="default: onnx, the only one")
    parser.add_argument("--int8", action="store_true", help="quantise, calibrated on train")
    parser.add_argument("--out", default="", help="default: beside PATH, such as runs/demo/student.onnx")
    arguments.add_json_flag(parser, "one JSON object instead of tables")
    args = parser.parse_args(argv)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{error.name} is not installed: pip install onnx onnxruntime onnxscript") from error
    if args.int8 and args.split == "train":
        raise BadInput("--int8: calibrated on train, so --split train would flatter it; use test or validation")

    folder = Path(args.model)
    out = Path(args.out or folder.parent / f"{folder.resolve().name}{'-int8' if args.int8 else ''}.onnx")
    machine = runtime.start("cpu", "off", "off")
    classifier = models.open_saved(args.model, machine)
    model, prep, size, *_ = classifier
    splits, about = open_data(args, [args.split, "train"] if args.int8 else [args.split], classifier)
    split, module = splits[args.split], models.FromPixels(models.freeze(model), prep)
    model.to(memory_format=torch.contiguous_format)
    logging.disable(logging.WARNING)    # onnxscript and onnxruntime are chatty; the check shows what it comes to
    try:
        # the file gets its name only once it has passed the check
        with tempfile.TemporaryDirectory(prefix=".kd-export-", dir=out.parent) as work:
            file = Path(work) / "model.onnx"
            write_onnx(module, size, file)
            if args.int8:
                quantize(file, splits["train"], size)
            describe(file, classifier)

            model.to(memory_format=torch.channels_last)     # in which PyTorch is fastest
            graph, batches = open_graph(file), np.split(np.arange(len(split)), range(BATCH, len(split), BATCH))
            logits = np.concatenate([graph(read_pixels(split, rows, size)) for rows in batches])
            result = {"file": str(out), "format": "onnx, int8" if args.int8 else "onnx", **about, **compare(
                predict(classifier, split, "checking"), logits, split.labels)}
            refuse(result, args.int8)
            picture = read_pixels(split, batches[0][:1], size)
            result |= {"pytorch_ms": milliseconds(lambda: module(torch.from_numpy(picture))),
                       "ms": milliseconds(lambda: graph(picture)), "bytes": file.stat().st_size,
                       "pytorch_bytes": (folder / "model.safetensors").stat().st_size}
            sync(file)
            os.replace(file, out)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror}); give a file in a folder that exists and "
                       f"has room") from error
    finally:
        logging.disable(logging.NOTSET)
    print(json.dumps(result) if args.json else f"{format_table(result)}\nwritten: {out}")
    return result
