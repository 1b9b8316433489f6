"""The import rule: train.py may import any leaf; a leaf imports libraries and at most the leaf that it stands on."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STANDS_ON = {
    "bench": None,  # times anything, train.py's step included
    "fused_triton": set(), "fused_cpu": set(),
    "data": {"samples", "hub"}, "samples": {"leaves"}, "images": {"pictures", "report"},
    "losses": {"fused_cpu", "fused_triton"},
    "models": {"distributed", "hub"},
    "batches": {"distributed", "models", "augment", "images", "logits", "runtime"},
    "distributed": {"runtime"},
    "checkpoint": {"distributed"}, "report": {"checkpoint", "cli", "compare", "distributed"}, "compare": {"cli"},
    "page": {"augment", "checkpoint", "cli", "compare", "scores", "images"},
    "bench_loss": {"losses"},
    "predict": {"distributed", "models", "images", "pictures", "report", "runtime", "cli"},
    "card": {"data"},
    # command lines over what train.py itself is made of
    "evaluate": {"scores", "models", "data", "images", "predict", "report", "runtime", "cli"},
    "export": {"evaluate", "models", "images", "report", "runtime", "cli"},
}


def imported(path: Path) -> set[str]:
    """The project's own modules that a file imports, at any depth: `losses` for `from kd.losses import x`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] in ("kd", "train", "tests")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.level:
                found.add("a relative import")
            elif node.module == "kd":
                found |= {name.name for name in node.names} - {"BadInput", "TrainingFault"}
            elif node.module.split(".")[0] in ("kd", "train", "tests"):
                found.add(node.module.removeprefix("kd."))
    return found


def test_every_leaf_stands_on_what_it_may():
    leaves = sorted(path for path in (ROOT / "kd").glob("*.py") if path.stem != "__init__")
    assert len(leaves) > 8
    for path in leaves:
        allowed = STANDS_ON.get(path.stem, set())
        if allowed is not None:
            assert imported(path) <= allowed, path.name


def test_nothing_in_kd_imports_train_or_takes_the_config():
    for path in (ROOT / "kd").glob("*.py"):
        if path.stem != "bench":
            assert not imported(path) & {"train", "tests"}, path.name
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "Config" not in names, path.name


def test_the_leaves_have_no_circle():
    graph = {path.stem: imported(path) for path in (ROOT / "kd").glob("*.py")}
    done: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph.get(name, set()):
                visit(other, (*above, name))
            done.append(name)

    for name in graph:
        visit(name, ())


def test_the_story_stays_short():
    assert len((ROOT / "train.py").read_text().splitlines()) < 400
