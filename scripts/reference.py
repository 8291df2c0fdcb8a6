"""Write generated files, or with --check only compare them. The scripts that generate files share this."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def write_or_check(pages: Mapping[Path, str], truth: str) -> None:
    """Write every page. With --check on the command line, only exit with a message if a page is out of date.

    truth: what the pages are generated from, for that message.
    """
    for file, text in pages.items():
        if "--check" not in sys.argv[1:]:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file}: this file does not match {truth}. Run `make references`.")
