"""How fast is it? `python -m kd bench` times the real `fit`, the real `train_step` and the real loss.

    python -m kd bench [--json] [train.py's flags]            the loop, part by part, against the machine's limits
    python -m kd bench compare [--json] [train.py's flags]    by turns with the tutorial's loop, in one process
    python -m kd bench loss [--json] [--help]                 the loss alone
    torchrun --standalone --nproc-per-node=N -m kd bench ...  the first, by N ranks, and the cost of their exchange

--rounds N (12) and --steps N (8, a round) say how long.
"""

import json

from kd import BadInput, cli


def main(argv: list[str]) -> None:
    """Print what was measured. Raises BadInput."""
    import train  # only now: `import kd.bench.loss` alone does not need it
    from kd.bench import loop, loss
    if argv[:1] == ["loss"]:
        loss.main(argv[1:])
        return
    kind, argv = (loop.parts, argv) if argv[:1] != ["compare"] else (loop.compare, argv[1:])
    parser = cli.OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    own, flags = parser.parse_known_args(argv)
    if min(own.rounds, own.steps) < 2:
        raise BadInput("--rounds and --steps must be at least 2")
    cfg = cli.parse_config(train.Config, {**train.RECIPES, "demo": loop.DEFAULTS}, flags, __doc__ or "")
    if kind is loop.compare and cli.RANKS > 1:
        raise BadInput("compare: times one process against another; start it without torchrun")
    result = kind(cfg, own.rounds, own.steps)
    if cli.RANK:  # the ranks have timed the same steps
        return
    if own.json:
        print(json.dumps(result))
    else:
        loop.show(result)
