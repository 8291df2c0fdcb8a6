"""The core has no I/O, devices, global randomness or modules."""

import ast
from pathlib import Path

import pytest
from helpers.scripts import script_module

import pgprune_cli

PACKAGE = Path(pgprune_cli.__file__).parent
SOURCES = {path.stem: path for path in sorted((PACKAGE / "core").glob("*.py"))}
CORE = list(SOURCES)
imports_in = script_module("draw_imports").imports_in


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
    actual = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted in ("torch.nn", "nn.Module") or node.attr in ("device", "cuda", "cpu", "to_device"):
                actual.append(dotted)
            if dotted in (
                "torch.manual_seed",
                "torch.seed",
                "torch.random",
                "torch.set_rng_state",
                "torch.default_generator",
            ):
                actual.append(dotted)
        elif isinstance(node, ast.alias) and node.name in ("nn", "Module", "manual_seed", "random", "device"):
            actual.append(f"import {node.name}")
        elif isinstance(node, ast.keyword) and node.arg == "device":
            actual.append("device=")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("open", "print", "input", "exec", "eval", "__import__"):
                actual.append(f"{called}()")
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
                actual.append(f"{called}() without a generator")
    return actual


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
