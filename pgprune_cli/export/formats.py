"""The formats of exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
