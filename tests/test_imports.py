"""The import rule: train.py may import all of kd, only kd/bench imports train, and nothing imports in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
           for path in sorted((ROOT / "kd").rglob("*.py"))}


def imported(path: Path, at_any_depth: bool = True) -> set[str]:
    """The project's own modules that a file imports: kd.losses for `from kd.losses import x`.

    at_any_depth: also within functions, where an import may wait until it is needed.
    """
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if at_any_depth else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            assert node.module
            names = {f"{node.module}.{name.name}" for name in node.names}
            # `from kd.machine import runtime` imports a module, `from kd.losses import choose` a name of one
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] in ("kd", "train", "tests", "results")}


def test_there_is_something_to_look_at():
    assert len(MODULES) > 30 and imported(ROOT / "train.py") >= {"kd.run", "kd.teacher", "kd.machine.distributed"}


@pytest.mark.parametrize("name", MODULES)
def test_only_the_bench_imports_train(name):
    forbidden = {"tests", "results"} if name.startswith("kd.bench") else {"train", "tests", "results"}
    assert not {one for one in imported(MODULES[name]) if one.split(".")[0] in forbidden}
    if not name.startswith("kd.bench") and name != "kd.config":
        names = {node.id for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Name)}
        assert "Config" not in names


ABOVE = {"kd.run", "kd.config", "kd.cli", "kd.tools", "kd.teacher", "kd.batches", "kd.losses", "kd.models"}


@pytest.mark.parametrize("room, unknown", [
    ("kd.data", ABOVE | {"kd.fast"}),
    ("kd.fast", ABOVE | {"kd.data", "kd.machine"}),
    ("kd.machine", ABOVE | {"kd.data", "kd.fast"}),
    ("kd.run", {"kd.losses", "kd.models", "kd.batches", "kd.predict", "kd.teacher", "kd.views", "kd.fast", "kd.data",
                "kd.tools", "kd.config"}),
    ("kd.losses", {"kd.run", "kd.data", "kd.machine", "kd.models", "kd.tools"}),
])
def test_a_room_does_not_know_what_stands_above_it(room, unknown):
    for name, path in MODULES.items():
        if name == room or name.startswith(room + "."):
            seen = {one for one in imported(path) for other in unknown if one == other or one.startswith(other + ".")}
            assert not seen, (name, seen)


def test_nothing_imports_in_a_circle():
    """At the top of modules; an import within a function runs later."""
    graph = {name: imported(path, at_any_depth=False) & MODULES.keys() for name, path in MODULES.items()}
    complete: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in complete:
            for other in graph[name]:
                if other != "kd":
                    visit(other, (*above, name))
            complete.add(name)

    for name in graph:
        visit(name, ())
