"""Flags from a dataclass: `Config` is the only place where a flag is declared, with its default and its meaning.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer before torch is loaded.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, NoReturn

from kd import BadInput, TrainingFault

RANK = int(os.environ.get("RANK", "0"))  # of this process, under torchrun
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "kd")


def flag(default: Any, help: str, choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf,
         above: float = -math.inf) -> Any:
    """A dataclass field that is also a command-line flag: one of `choices`, or low <= value <= high, value > above."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high,
                                                        "above": above})


def check(config: Any) -> None:
    """Raise BadInput for the first value that its field does not allow, naming the nearest that it does."""
    for field in dataclasses.fields(config):
        value, allowed, option = getattr(config, field.name), field.metadata, f"--{field.name.replace('_', '-')}"
        if allowed["choices"] and value not in allowed["choices"]:
            raise BadInput(f"{option} {value}: not one of its values{nearest(value, list(allowed['choices']))}")
        if isinstance(value, (int, float)) and not (allowed["low"] <= value <= allowed["high"]
                                                    and allowed["above"] < value < math.inf):
            bounds = [f"{word} {bound:g}" for word, bound in
                      (("at least", allowed["low"]), ("at most", allowed["high"]), ("above", allowed["above"]))
                      if math.isfinite(bound)]
            raise BadInput(f"{option} {value}: must be {' and '.join(bounds) or 'finite'}")


def nearest(word: str, known: list[str]) -> str:
    """`"; did you mean A or B?"`, or the whole list where it is short, for an error line about `word`."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else ""


def default_text(name: str, default: Any, recipes: dict[str, dict[str, Any]]) -> str:
    """The default of a flag, and where a recipe has another one, that."""
    others = [f"{recipe}: {settings[name]}" for recipe, settings in recipes.items() if name in settings]
    return "; ".join([str(default), *others])


def flags_table(config_class: type, recipes: dict[str, dict[str, Any]]) -> str:
    """Every flag, its default (and where a recipe has another one, that) and its meaning, as a Markdown table."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(config_class):
        text, choices = field.metadata["help"], ", ".join(field.metadata["choices"])
        default = default_text(field.name, "" if isinstance(field.default, bool) else field.default, recipes)
        lines.append(f"| `--{field.name.replace('_', '-')}` | {default} | {text}{f' ({choices})' if choices else ''} |")
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """Raises BadInput where argparse would print its whole usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def parse_config(config_class: type, recipes: dict[str, dict[str, Any]], argv: list[str], doc: str) -> Any:
    """Build `config_class` from defaults, then the chosen recipe, then the flags (each overrides the last).

    Raises BadInput for an unknown flag, value or recipe, naming the nearest known ones.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    # allow_abbrev=False: `--teacher-weight` must be refused, not guessed
    parser = OneLineParser(prog="train.py", description=doc, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, field in fields.items():
        option = "--" + name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", default=None, help=text)
        else:
            shown = "|".join(field.metadata["choices"]) or type(field.default).__name__.upper()
            default = "" if field.default == "" else f" (default: {default_text(name, field.default, recipes)})"
            parser.add_argument(option, type=type(field.default), metavar=shown, default=None, help=text + default)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        raise BadInput(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], options)}")
    flags = {name: value for name, value in vars(given).items() if value is not None}
    recipe = flags.get("recipe", fields["recipe"].default)
    config = config_class(**{**recipes.get(recipe, {}), **flags, "recipe": recipe})
    check(config)
    return config


def parse_or_exit(config_class: type, recipes: dict[str, dict[str, Any]], doc: str | None) -> Any:
    """`parse_config` of the command line; a mistake ends the process with one line and status 2."""
    try:
        return parse_config(config_class, recipes, sys.argv[1:], doc or "")
    except BadInput as error:
        fail(error, error.status)


def command(config: Any, recipes: dict[str, dict[str, Any]], skip: set[str]) -> str:
    """The shortest command that gives `config` again, but for the flags in `skip`: a pure function of `config`.

    Of a path only the last part is named: where a file lies on one machine is nobody's business on another.
    """
    settings = {field.name: field.default for field in dataclasses.fields(config)} | recipes.get(config.recipe, {})
    words = ["python", "train.py"]
    for name, value in dataclasses.asdict(config).items():
        if name not in skip and value != settings[name]:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [base_name(str(value))])
    return shlex.join(words)


def base_name(value: str) -> str:
    """The last part of what is clearly a path; `owner/name`, which the Hub's ids look like, stays as it is."""
    return Path(value).name if value.startswith(("/", "~", ".")) or value.count("/") > 1 else value


def fail(message: object, status: int, program: str = "train.py") -> NoReturn:
    """Print one line on stderr and leave with `status`: users never see a traceback for what they can mend.

    What every rank found wrong is said once: by rank 0, after which torchrun ends the others while they wait here. What
    another rank alone has found, it says itself.
    """
    if RANK:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # torchrun looks at its ranks ten times a second, but later than that on a busy machine
        message = f"rank {RANK}: {message}"
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def run(main: Callable[[Any], Any], config: Any) -> None:
    """Print what `main(config)` returns as one line of JSON; what a user can mend becomes one line and a status.

    With `config.quiet` that line is all: what `main` prints, bars and warnings included, goes nowhere.
    """
    try:
        with contextlib.ExitStack() as hushed:
            if config.quiet or RANK:
                nowhere = hushed.enter_context(open(os.devnull, "w"))
                hushed.enter_context(contextlib.redirect_stdout(nowhere))
                hushed.enter_context(contextlib.redirect_stderr(nowhere))
            result = main(config)
        if not RANK:
            print(json.dumps(result))
    except Exception as error:
        status = getattr(error, "status", None)  # that of BadInput, TrainingFault and Stopped
        if RANKS > 1 and status is None and (type(error).__name__ in ("DistBackendError", "DistNetworkError")
                                             or "gloo" in str(error).lower()):
            fail("another rank has ended; start again with --resume, or let torchrun do it (--max-restarts)",
                 TrainingFault.status)
        if status is None and not _out_of_memory(error):
            raise
        memory = (f"out of memory with --batch-size {config.batch_size} and --size {config.size}; make one of them "
                  f"smaller, then --overwrite")
        fail(error if status else memory, status or TrainingFault.status)


def _out_of_memory(error: Exception) -> bool:
    # torch names its own on CUDA; its CPU allocator raises a plain RuntimeError
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error))
