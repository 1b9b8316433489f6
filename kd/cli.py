"""The command line from a dataclass: `Config` (kd/config.py) is the only place where a flag is declared.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer before torch is loaded.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import math
import numbers
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, NoReturn

from kd import BadInput, TrainingFault
from kd.machine.ranks import rank, ranks

Recipes = dict[str, dict[str, Any]]     # by name, the settings that differ from the defaults

CACHE_DIR = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kd")     # an empty variable counts as unset


# ---- declaring and checking flags ------------------------------------------------------------------------------

def flag(default: Any, help: str, choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf,
         above: float = -math.inf, free: bool = False) -> Any:
    """A dataclass field that is also a flag. Its value is one of `choices`, or low <= value <= high, value > above.

    free: it may differ between a run and its continuation. Any other change would make it another run.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high,
                                                        "above": above, "free": free})


def free_flags(config_class: Any) -> set[str]:
    """The fields that may differ between a run and its continuation."""
    return {field.name for field in dataclasses.fields(config_class) if field.metadata["free"]}


def option_of(name: str) -> str:
    """The flag of a field: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def check(config: Any) -> None:
    """Raise BadInput for the first value that its field does not allow, naming the nearest allowed ones."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata

        if limits["choices"] and value not in limits["choices"]:
            raise BadInput(f"{option_of(field.name)} {value}: not one of its values"
                           f"{nearest(value, list(limits['choices']))}")

        if isinstance(value, (int, float)):
            inside = limits["low"] <= value <= limits["high"] and limits["above"] < value < math.inf
            if not inside:      # also for NaN
                words = [("at least", limits["low"]), ("at most", limits["high"]), ("above", limits["above"])]
                bounds = " and ".join(f"{word} {bound:g}" for word, bound in words if math.isfinite(bound))
                raise BadInput(f"{option_of(field.name)} {value}: must be {bounds or 'finite'}")


def nearest(word: str, known: list[str]) -> str:
    """For an error line about `word`: "; did you mean A or B?", or a short list of all that is known."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else ""


# ---- parsing -----------------------------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """Raises BadInput where argparse would print its whole usage and leave, and for an empty value."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        takes_value = {option for action in self._actions if action.nargs != 0 for option in action.option_strings}
        for before, word in zip(["", *args], args):
            option, equals, value = word.partition("=")
            if not word or (option.startswith("--") and equals and not value):
                # such as "$PHOTOS", where the shell knows no PHOTOS
                name = option or (before if before in takes_value else "an argument")
                raise BadInput(f"{name}: its value is empty; give one, or leave the flag out")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def parse_config(config_class: type, recipes: Recipes, argv: list[str], doc: str) -> Any:
    """`build_config` of a command line. Raises BadInput for a mistake, naming the nearest known flag or value."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    parser = _parser(fields, recipes, doc)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        options = ["--help", *map(option_of, fields)]
        raise BadInput(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], options)}")

    flags = {name: value for name, value in vars(given).items() if value is not None}
    return build_config(config_class, recipes, flags)


def build_config(config_class: type, recipes: Recipes, flags: dict[str, Any]) -> Any:
    """Build `config_class` from its defaults, overridden by the recipe, overridden by the flags.

    Raises BadInput for an unknown flag, value or recipe, naming the nearest known ones.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name in flags:
        if name not in fields:
            raise BadInput(f"unknown argument {name}{nearest(name, list(fields))}")

    settings = {}
    for name, value in flags.items():
        kind: Any = type(fields[name].default)
        # A path may be a Path, and an int, of NumPy too, may stand for a float.
        allowed: Any = {bool: bool, int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike)}[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise BadInput(f"{option_of(name)} {value!r}: must be of type {kind.__name__}")
        settings[name] = kind(value)
    recipe = settings.get("recipe", fields["recipe"].default)
    config = config_class(**{**recipes.get(recipe, {}), **settings, "recipe": recipe})
    check(config)
    return config


def _parser(fields: dict[str, dataclasses.Field], recipes: Recipes, doc: str) -> OneLineParser:
    # allow_abbrev=False, because a mistyped `--teacher-weight` must be refused, not guessed
    parser = OneLineParser(prog="train.py", description=doc, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, field in fields.items():
        text = field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(option_of(name), action="store_true", default=None, help=text)
        else:
            values = "|".join(field.metadata["choices"]) or type(field.default).__name__.upper()
            default = "" if field.default == "" else f" (default: {default_text(name, field.default, recipes)})"
            parser.add_argument(option_of(name), type=type(field.default), metavar=values, default=None,
                                help=text + default)
    return parser


def default_text(name: str, default: Any, recipes: Recipes) -> str:
    """The default of a flag, followed by the recipes that have another one."""
    others = [f"{recipe}: {settings[name]}" for recipe, settings in recipes.items() if name in settings]
    return "; ".join([str(default), *others])


def parse_or_exit(config_class: type, recipes: Recipes, doc: str | None) -> Any:
    """`parse_config` of this process's command line. A mistake ends the process with one line and status 2."""
    escape_unknown_letters()
    try:
        return parse_config(config_class, recipes, sys.argv[1:], doc or "")
    except BadInput as error:
        fail(error, error.status)


# ---- the command that gives a config again, and its folder ----------------------------------------------------------

def command(config: Any, recipes: Recipes) -> str:
    """The shortest command that gives `config` again, without what only says where and how it runs.

    Only the last part of a path is named: where a file lies on one machine is nobody's business on another.
    """
    settings = {field.name: field.default for field in dataclasses.fields(config)} | recipes.get(config.recipe, {})
    skip = free_flags(config) - {"allow_weak_teacher"}
    words = ["python", "train.py"]
    for name, value in dataclasses.asdict(config).items():
        if name not in skip and value != settings[name]:
            words += [option_of(name)] + ([] if value is True else [base_name(str(value))])
    return shlex.join(words)


def base_name(value: str) -> str:
    """The last part of what is clearly a path. `owner/name`, as the Hub's ids look, stays as it is."""
    if value.startswith("local-dir:"):      # timm's prefix for a folder
        return "local-dir:" + Path(value.removeprefix("local-dir:")).name
    return Path(value).name if value.startswith(("/", "~", ".")) or value.count("/") > 1 else value


def default_folder(recipe: str, dataset: str, config: str, own_dataset: str) -> Path:
    """The folder of a run without --out. Two data sets never share one.

    own_dataset: the recipe's, whose runs have the folder runs/RECIPE. Other data add their Hub id, or their path from
    the working directory (absolute where they lie outside), and their --config. A slash becomes "--".
    """
    if (dataset, config) == (own_dataset, ""):
        return Path("runs", recipe)
    name, path = dataset, Path(dataset).expanduser()
    if path.exists() or dataset.startswith(("/", "~", ".")):
        name = os.path.abspath(path).removeprefix(os.path.join(os.getcwd(), ""))
    words = [re.sub(r"[^\w.-]", "-", word.replace("/", "--")) for word in (name, config) if word]
    return Path("runs", f"{recipe}-{'@'.join(words)}")


# ---- running, and leaving with one line and a status ---------------------------------------------------------------

def escape_unknown_letters() -> None:
    """Print λ as \\u03bb, not as an error, where the terminal or the pipe has an encoding without it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run(main: Callable[[Any], Any], config: Any) -> None:
    """Print what `main(config)` returns as one line of JSON, the last on stdout.

    Whatever a user can mend becomes one line on stderr and an exit status. A bug keeps its traceback. Under `--quiet`,
    and in every rank but the first, nothing else is printed.
    """
    try:
        with contextlib.ExitStack() as hushed:
            if config.quiet or rank():
                nowhere = hushed.enter_context(open(os.devnull, "w", encoding="utf-8"))
                hushed.enter_context(contextlib.redirect_stdout(nowhere))
                hushed.enter_context(contextlib.redirect_stderr(nowhere))
            result = main(config)
        if not rank():
            print(json.dumps(result))
    except Exception as error:
        status = getattr(error, "status", None)  # of BadInput, TrainingFault and Stopped
        if status is not None:
            fail(error, status)
        if _lost_rank(error):
            fail("another rank has ended; start again with --resume, or let torchrun do it (--max-restarts)",
                 TrainingFault.status)
        if _out_of_memory(error):
            fail(f"out of memory with --batch-size {config.batch_size} and --size {config.size}; make one of them "
                 f"smaller, then --overwrite", TrainingFault.status)
        raise


def fail(message: object, status: int, program: str = "train.py") -> NoReturn:
    """Print one line on stderr and leave with `status`: users never see a traceback for what they can mend.

    Only lines that the message indents by two spaces, such as the names of many files, stay lines of their own.

    Several ranks may find the same fault. Rank 0 then says it and leaves, and torchrun ends the others while they wait
    here. A fault that only another rank found is said by that rank, after the wait.
    """
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # torchrun looks at its ranks ten times a second, but less often on a busy machine
        message = f"rank {rank()}: {message}"
    lines = [" ".join(line.split()) for line in str(message).split("\n  ")]
    print(f"{program}: error: " + "\n  ".join(lines), file=sys.stderr)
    sys.exit(status)


def _lost_rank(error: Exception) -> bool:
    of_network = type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo" in str(error).lower()
    return ranks() > 1 and of_network


def _out_of_memory(error: Exception) -> bool:
    # torch has a type of its own for CUDA; its CPU allocator raises a plain RuntimeError
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error))
