"""The command lines of the tools: what their parsers have in common."""

import argparse

from kd import cli


def make_parser(command: str, description: str | None) -> cli.OneLineParser:
    """The parser of `python -m kd COMMAND`, whose errors are BadInput."""
    # allow_abbrev=False: a mistyped flag must be refused, not guessed
    return cli.OneLineParser(prog=f"python -m kd {command}", description=description, allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter)


def add_json_flag(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--json", action="store_true", help=meaning)


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where to compute, and in which precision."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="default: auto, CUDA where there is a GPU")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                        help="default: auto, as in training; in another precision, a picture that the model is "
                        "unsure of may get another class")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Which saved model, and which pictures of which data set."""
    parser.add_argument("model", metavar="PATH", help="folder that train.py saved, such as runs/demo/student")
    parser.add_argument("--dataset", default="", help="leaves, a Hub dataset id, or a folder, as for train.py "
                        "(default: that of the run which PATH lies in, read as the run read it)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    for name, meaning in (("config", "configuration, where it has several"),
                          ("image", "column of pictures, where that cannot be told"),
                          ("label", "column of labels, where that cannot be told")):
        parser.add_argument(f"--{name}", default="", help=f"its {meaning}")
    parser.add_argument("--cache-dir", default=cli.CACHE_DIR, help="where decoded images are kept")
