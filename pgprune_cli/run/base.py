"""The base model of a run or an export: where it is now."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.model.names import DEMO, is_hub_name
from pgprune_cli.model.source import Source, resolve, resolve_recorded
from pgprune_cli.run.decision import Decision, Origin
from pgprune_cli.storage.paths import expanded


def find_base(decided: Decision | Origin, where: Path, moved_to: str | None = None, option: str = "--model") -> Source:
    """Return the files of the base model. Whether they are those that were searched is not checked here.

    where: the run or the export; moved_to: where the user says that the model is now, as models are named in recipes;
    option: what says so on the command line, for error messages.

    Raises:
        UserError: it is not there, or its files are incomplete.
    """
    if moved_to is not None:
        return resolve(moved_to)
    name = decided.model
    if name != DEMO and not is_hub_name(name) and not expanded(name).exists():
        raise UserError(f"{name}: missing. It is the base model of {where}. Say where it is now with {option}.")
    try:
        return resolve_recorded(name)
    except UserError as error:
        raise UserError(f"{error} If the base model of {where} is elsewhere, say where with {option}.") from None
