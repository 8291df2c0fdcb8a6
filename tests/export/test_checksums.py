"""The checksums of the code that is copied into exports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pgprune_cli.serving
from pgprune_cli.export import checksums

SERVING = Path(pgprune_cli.serving.__file__).parent


@pytest.mark.parametrize("name", checksums.CODE)
def test_code_has_the_checksum_of_the_file_that_pgprune_ships(name: str) -> None:
    """If this fails after a change of the file, put its new sha256 into checksums.py."""
    assert checksums.CODE[name] == checksums.checksum(SERVING / name)


@pytest.mark.parametrize("name", checksums.CODE)
def test_code_that_is_copied_into_exports_imports_nothing_of_pgprune(name: str) -> None:
    imports = [
        (module or "")
        for node in ast.walk(ast.parse((SERVING / name).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    assert imports and not [module for module in imports if module.startswith(("pgprune", "."))]
