"""How fast is it? `python -m kd bench` times the real `fit`, the real `train_step` and the real loss.

    python -m kd bench ladder [--json] [--figure FILE] [train.py's flags]
        from the tutorial's loop to ours, one idea at a time
    python -m kd bench compare [--json] [--compiled] [train.py's flags]
        against the tutorial's loop and timm's own distillation task; --compiled: also these compiled
    python -m kd bench loss [--json] [--help]
        the loss alone

`ladder` and `compare` time by turns, in one process. They make as many rounds as end within --minutes M (4.5), at
least 5; --rounds N says how many instead. A round of a fast loop has --steps N steps (8).
"""

import json
import math

from kd import BadInput, cli
from kd.config import RECIPES, Config, check
from kd.machine import ranks

# Recipe `demo` is another one here: the pair of the tutorial, from random weights, on its pictures.
PAIR = {"dataset": "beans", "size": 224, "batch_size": 8, "teacher": "resnet50", "teacher_weights": "none",
        "student": "mobilenetv2_100"}


def main(argv: list[str]) -> None:
    """Print what was measured. Raises BadInput."""
    if argv[:1] == ["loss"]:    # which needs none of train.py
        from kd.bench import loss
        loss.main(argv[1:])
        return
    if argv[:1] not in (["ladder"], ["compare"]):
        if argv in ([], ["-h"], ["--help"]):
            print(__doc__)
            return
        raise BadInput(f"bench {argv[0]}: no such comparison; give ladder, compare or loss")

    parser = cli.OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=4.5)
    if argv[0] == "ladder":
        parser.add_argument("--figure", default="")
    else:
        parser.add_argument("--compiled", action="store_true")
    own, flags = parser.parse_known_args(argv[1:])
    if own.steps < 2 or own.rounds == 1 or own.rounds < 0:
        raise BadInput("--rounds and --steps must be at least 2")
    if not 0 < own.minutes < math.inf:
        raise BadInput(f"--minutes {own.minutes}: must be above 0, and finite")
    cfg: Config = cli.parse_config(Config, {**RECIPES, "demo": PAIR}, flags, __doc__ or "")
    for unused in ("labels", "unlabelled", "teacher_size", "topk"):     # they would change the time of a real run
        if getattr(cfg, unused):
            raise BadInput(f"{cli.option_of(unused)} {getattr(cfg, unused)}: not part of what is timed; leave it out")
    check(cfg)
    if ranks.ranks() > 1:
        raise BadInput(f"{argv[0]}: times loops of one process; start it without torchrun")

    from kd.bench import compare, ladder    # here, after the flags, because they load torch
    if argv[0] == "ladder":
        result = ladder.ladder(cfg, own.steps, own.rounds, own.minutes)
        if own.figure:
            ladder.draw(result, own.figure)
        text = ladder.table(result)
    else:
        result = compare.compare(cfg, own.steps, own.rounds, own.minutes, own.compiled)
        text = compare.table(result)
    print(json.dumps(result) if own.json else text)
