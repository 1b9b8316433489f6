"""How fast is it? `python -m kd bench` times the real `fit`, the real `train_step` and the real loss.

    python -m kd bench [--json] [train.py's flags]            the loop, part by part, against the machine's limits
    python -m kd bench compare [--json] [train.py's flags]    by turns with the tutorial's loop and timm's own
                                                              distillation task, in one process, for 5 minutes
    python -m kd bench switches [--json] [train.py's flags]   what each fast path gains, on and off by turns
    python -m kd bench loss [--json] [--help]                 the loss alone
    torchrun --standalone --nproc-per-node=N -m kd bench ...  the first, by N ranks, and the cost of their exchange

--rounds N (12) and --steps N (8, a round) say how long. `compare` makes as many rounds as end within --minutes M (4.5),
at least 5, unless --rounds says how many. Its --compiled also times the others' loops under torch.compile.
"""

import json
import math
from typing import Any

from kd import BadInput, cli


def main(argv: list[str]) -> None:
    """Print what was measured. Raises BadInput."""
    if argv[:1] == ["loss"]:    # which needs none of train.py
        from kd.bench import loss
        loss.main(argv[1:])
        return
    import train
    from kd import methods
    from kd.bench import compare, loop

    name = argv[0] if argv and argv[0] in ("compare", "switches") else ""

    parser = cli.OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, default=8)
    if name == "compare":
        parser.add_argument("--minutes", type=float, default=compare.MINUTES)
        parser.add_argument("--compiled", action="store_true")
    own, flags = parser.parse_known_args(argv[1:] if name else argv)
    if min(own.steps, 2 if own.rounds is None else own.rounds) < 2:
        raise BadInput("--rounds and --steps must be at least 2")
    if name == "compare" and not 0 < own.minutes < math.inf:
        raise BadInput(f"--minutes {own.minutes}: must be above 0, and finite")
    cfg = cli.parse_config(train.Config, {**train.RECIPES, "demo": loop.DEFAULTS}, flags, __doc__ or "")
    for unused in ("labels", "unlabelled", "teacher_size", "topk"):     # they would change the time of a real run
        if getattr(cfg, unused):
            raise BadInput(f"{cli.option_of(unused)} {getattr(cfg, unused)}: not part of what is timed; leave it out")
    methods.check_flags(cfg)
    if name and cli.ranks() > 1:
        raise BadInput(f"{name}: times one process against another; start it without torchrun")

    if name == "compare":
        result = compare.compare(cfg, own.steps, own.rounds or 0, own.minutes, own.compiled)
    else:
        result = (compare.switches if name else loop.parts)(cfg, own.rounds or 12, own.steps)
    if cli.rank():  # the ranks have timed the same steps
        return
    if own.json:
        print(json.dumps(result))
    elif name == "compare":
        print(compare.table(result))
    else:
        show(result)


def show(result: dict[str, Any], indent: str = "") -> None:
    """A line a figure."""
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{key:24} {f'{value:.3f}' if isinstance(value, float) else value}")
