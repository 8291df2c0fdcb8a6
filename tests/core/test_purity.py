"""The layering of ARCHITECTURE.md, held by parsing every import; and the core, held pure."""

import ast
from pathlib import Path

import pytest

import pgprune_cli

PACKAGE = Path(pgprune_cli.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CORE = [name for name in SOURCES if name.split(".")[0] == "core"]

# What each part of the package may import of the package. `__init__`, the version, is open to all.
BELOW = {
    "errors": set(),
    "stderr": set(),
    "suggest": set(),
    "signals": set(),
    "lock": {"atomic", "errors", "stderr"},
    "atomic": {"errors"},
    "core": {"core"},
    "distributed": {"errors"},
    "devices": {"distributed", "errors"},
    "arch": {"core", "errors"},
    "eight_bit": {"arch", "errors"},
    "demo": {"demo"},
    "recipe": {"strict_yaml"},
    "recipe_reader": {"errors", "recipe", "strict_yaml", "suggest"},
    "recipe_text": {"atomic", "errors", "recipe", "recipe_reader", "strict_yaml"},
    "run_files": {"errors"},
    "saved": {"run_files"},
    "tables": set(),
    "strict_yaml": {"errors", "suggest"},
    "progress": {"errors", "history", "live_view", "stderr"},
    "live_view": {"history"},
    "trackers": {"errors", "history", "provenance"},
    "history": {"atomic", "errors", "run_files"},
    "provenance": set(),
    "measured": {"atomic", "run_files"},
    "scores": {"atomic", "errors", "recipe", "run_files"},
    "policies": {"arch", "core", "errors", "width_table"},
    "checkpoint": {"atomic", "core", "errors", "history", "run_files"},
    "decision": {"arch", "atomic", "errors", "run_files"},
    "portions": {"errors"},
    "scores": {"scores", "arch", "core", "errors", "moments", "portions", "sensitivity", "streaming"},
    "moments": {"arch", "streaming"},
    "sensitivity": {"arch", "errors", "portions"},
    "substrate": {"arch", "core", "eight_bit", "portions"},
    "streaming": {"arch", "core", "portions"},
    "data": {"atomic", "demo", "errors", "quiet_hub", "stderr", "suggest"},
    "gguf_header": {"errors"},
    "trust": {"arch", "atomic", "errors", "gguf_header"},
    "quiet_hub": set(),
    "source": {"atomic", "errors", "quiet_hub", "trust"},
    "loading": {"arch", "devices", "eight_bit", "errors", "gguf_header", "source", "trust", "writers"},
    "writers": {"arch", "atomic", "core", "decision", "errors", "loading", "source", "writers"},
    "serving": {"serving", "writers"},
    "report": {
        "report",
        "checkpoint",
        "core",
        "decision",
        "errors",
        "history",
        "measured",
        "provenance",
        "run_files",
    }
    | {"scores", "tables"},
    "repair": {"arch", "errors", "moments", "scores", "sensitivity", "streaming", "substrate"},
    "width_table": {"arch", "core", "moments", "repair", "sensitivity", "streaming"},
    "width_files": {"atomic", "errors", "run_files", "width_table"},
    "costs": {"arch", "atomic", "errors", "streaming", "substrate"},
    "matmul_rate": {"costs"},
    "estimate": {"arch", "costs", "estimate", "recipe", "scores", "sensitivity", "substrate", "width_table"},
    "budget": {"arch", "core", "costs", "errors", "progress", "recipe", "substrate"},
}
ABOVE = {"jobs", "api", "verbs", "cli", "__main__"}  # may import anything but what is said of them below


def imports_in(tree: ast.AST) -> set[str]:
    """Every module a source names in an import, wherever in it: `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: Path) -> set[str]:
    """The first names below `pgprune_cli` that a source imports."""
    own = {name.split(".", 2)[1] for name in imports_in(ast.parse(path.read_text())) if name.startswith("pgprune_cli.")}
    return own - {"__version__"}


def test_the_parser_sees_every_kind_of_import() -> None:
    source = "import a.b\ndef f():\n    from pgprune_cli import cli, x\nif t:\n    from c.d import e as g\n"
    expected = {"a.b", "pgprune_cli", "pgprune_cli.cli.program", "pgprune_cli.x", "c.d", "c.d.e"}
    assert imports_in(ast.parse(source)) == expected


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_downward_only(name: str) -> None:
    part, imported = name.split(".")[0], parts_imported(SOURCES[name])
    if part != "__main__":
        assert "cli" not in imported
    assert "__main__" not in imported
    if part in ABOVE or name == "__init__":
        return
    assert part in BELOW, f"{name}: say in this test what a new part of the package may import"
    assert imported <= BELOW[part], f"{name} imports upward: {imported - BELOW[part]}"


def test_the_layers_have_no_circle() -> None:
    """The table above itself goes downward: parts can be put in a row in which each imports only earlier ones."""
    left = {part: below - {part} for part, below in BELOW.items()}
    left["loading"] = left["loading"] - {"writers"}  # registers the model classes of writers/modeling_pruned
    while left:
        free = {part for part, below in left.items() if not below & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {part: below for part, below in left.items() if part not in free}


@pytest.mark.parametrize("name", ["writers.modeling_pruned", "writers.modeling_mlx"])
def test_the_modelling_code_that_travels_needs_no_pgprune(name: str) -> None:
    assert not any(module.startswith("pgprune") for module in imports_in(ast.parse(SOURCES[name].read_text())))


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_only_torch_and_pure_modules(name: str) -> None:
    outside = {module.split(".")[0] for module in imports_in(ast.parse(SOURCES[name].read_text()))}
    assert outside <= {
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "torch",
        "typing",
        "pgprune_cli",
    }


def impurities(tree: ast.AST) -> list[str]:
    """What a source does that the core must not: modules, devices, files, printing, and randomness that is global."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted in ("torch.nn", "nn.Module") or node.attr in ("device", "cuda", "cpu", "to_device"):
                found.append(dotted)
            if dotted in (
                "torch.manual_seed",
                "torch.seed",
                "torch.random",
                "torch.set_rng_state",
                "torch.default_generator",
            ):
                found.append(dotted)
        elif isinstance(node, ast.alias) and node.name in ("nn", "Module", "manual_seed", "random", "device"):
            found.append(f"import {node.name}")
        elif isinstance(node, ast.keyword) and node.arg == "device":
            found.append("device=")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("open", "print", "input", "exec", "eval", "__import__"):
                found.append(f"{called}()")
            draws = called.split(".")[-1] in (
                "rand",
                "randn",
                "randint",
                "randperm",
                "bernoulli",
                "multinomial",
                "normal",
            )
            in_place = called.split(".")[-1] in ("bernoulli_", "uniform_", "normal_", "random_", "exponential_")
            if (draws or in_place) and not any(keyword.arg == "generator" for keyword in node.keywords):
                found.append(f"{called}() without a generator")
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_pure(name: str) -> None:
    assert impurities(ast.parse(SOURCES[name].read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.manual_seed(0)",
        "x = torch.rand(3)",
        "x.bernoulli_()",
        "open('a')",
        "print(1)",
        "x.to(y.device)",
        "torch.zeros(2, device=d)",
        "class A(nn.Module): pass",
        "from torch import nn",
        "x = y.cuda()",
    ],
)
def test_an_impure_line_would_be_found(source: str) -> None:
    assert impurities(ast.parse(source))
