"""The program as users run it, in this process."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.commands import parsed
from helpers.schemas import validate

from pgprune_cli.cli import program


@pytest.fixture
def pgprune(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run the program in this process: (exit code, stdout, stderr). The output of --json must match its schema."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgprune", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_of:
            program.main()
        out, err = capfd.readouterr()
        if "--json" in arguments and out:
            verb = parsed(arguments)
            dry = " --dry-run" if verb in ("search", "recover") and "--dry-run" in arguments else ""
            validate(verb + dry, json.loads(out))
        return int(exit_of.value.code or 0), out, err

    return run
