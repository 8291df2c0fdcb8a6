"""The formats of exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pgprune_cli.errors import UserError
from pgprune_cli.export import gguf, hf, mlx
from pgprune_cli.export.plan import DTYPES, Again, Measured, Options, Plan
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision


class MakesPlan(Protocol):
    """Return the plan of an export, as `hf.plan` does."""

    def __call__(
        self,
        source: Source,
        decision: Decision,
        options: Options,
        measured: Measured | None = None,
        again: Again | None = None,
    ) -> Plan: ...


@dataclass(frozen=True)
class Format:
    """A format of exports.

    plan: makes the plan of an export; dtypes: those supported; suffix: of the file, "" if the export is a directory.
    """

    plan: MakesPlan
    dtypes: tuple[str, ...] = DTYPES
    suffix: str = ""


FORMATS = {"hf": Format(hf.plan), "gguf": Format(gguf.plan, gguf.DTYPES, ".gguf"), "mlx": Format(mlx.plan)}


def refuse_other_suffix(out: Path, format: str) -> None:
    """Raise UserError if `out` is not named as the format writes it: a file with its suffix, or a directory."""
    suffix = FORMATS[format].suffix
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out}: --format {format} writes a single file. Give a name that ends in {suffix}.")
    meant = next((name for name, other in FORMATS.items() if other.suffix and out.suffix == other.suffix), None)
    if not suffix and meant:
        raise UserError(
            f"--out {out}: --format {format} writes a directory. Add --format {meant}, or give another name."
        )
