"""What the scripts that write references share: they write pages, or with --check only look whether they would."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def write_or_check(pages: Mapping[Path, str], truth: str) -> None:
    """Writes every page. With --check on the command line it writes nothing, and exits where one is not what `truth`
    says."""
    for file, text in pages.items():
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file.name} is not what {truth} says; run `make references`")
