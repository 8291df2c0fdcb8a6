"""Error messages on stderr."""

from __future__ import annotations

import sys
from typing import Any

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.console.suggest import nearest
from pgprune_cli.distributed import ranks_from_environment
from pgprune_cli.errors import in_short


def complain(text: str) -> None:
    """Print every line of a message on stderr, after the program's name (and under torchrun its rank)."""
    from pgprune_cli.recipe.strict_yaml import one_line

    ranks = ranks_from_environment()
    program = "pgprune" if ranks.world_size == 1 else f"pgprune, rank {ranks.rank}"
    for line in text.splitlines():  # parts may come from files, so terminal control characters are escaped
        print(f"{program}: {one_line(line)}", file=STDERR)


def usage_fault(error: Exception, program: Any) -> str | None:
    """Return one line for an error of the argument parser: what is wrong, and which help page to read.

    program: the command that the parser was made from, with its subcommands.

    Returns "" if the parser has printed the help already, None if the error is not the parser's. The parser's classes
    move between versions of Typer, so they are recognised by their attributes.
    """
    parser: Any = error
    if not hasattr(parser, "format_message"):
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        parser.show()
        return ""
    words, command = _command_of(program)
    if possible := getattr(parser, "possibilities", None):  # the parser would list them in alphabetical order
        hint = nearest(parser.option_name, possible) or "."
        message = f"no such option: {parser.option_name}{hint}"
    elif " requires an argument" in parser.format_message():
        metavars = [option.metavar for option in command.params if parser.option_name in option.opts]
        message = f"{parser.option_name}: needs a value{f', {metavars[0]}' if any(metavars) else ''}."
    elif problem := _wrong_number(parser):
        message = problem
    else:
        message = " ".join(parser.format_message().replace("Value error, ", "").split()).rstrip(".?")
        message = message.replace(". Did you mean ", ", did you mean ")
        message = f"{message[:1].lower()}{message[1:]}{'?' if 'did you mean' in message else '.'}"
    return f"{message} See `{words} --help`."


def _command_of(program: Any) -> tuple[str, Any]:
    """Return the command that was given: its words, and the parser's own object. Not all faults know it."""
    words, command = ["pgprune"], program
    for word in sys.argv[1:]:
        if word not in getattr(command, "commands", {}):
            break
        words.append(word)
        command = command.commands[word]
    return " ".join(words), command


def _wrong_number(fault: Any) -> str:
    """Return what is wrong if the value of an option is not a number, else ""."""
    if not hasattr(fault.__cause__, "errors"):  # Typer reads values with pydantic, whose faults have this
        return ""
    found = fault.__cause__.errors()[0]
    expected = {"float_parsing": "a number such as 0.3", "int_parsing": "an integer"}.get(found["type"])
    if expected is None:
        return ""
    repeat = " Repeat the option for several." if fault.param.multiple and "," in found["input"] else ""
    return f"{fault.param.opts[0]} {found['input']}: expected {expected}.{repeat}"


def loop_fault(error: Exception) -> str | None:
    """Return one line for a link that leads back to itself, and None for any other error."""
    start = "Symlink loop from "  # Path.resolve raises a RuntimeError before Python 3.13
    if not isinstance(error, RuntimeError) or not str(error).startswith(start):
        return None
    path = str(error).removeprefix(start).strip("'")
    return f"{path}: a link that leads back to itself. Choose another path."


def memory_fault(error: Exception) -> str | None:
    """Return one line if a GPU or the host has run out of memory, and None for any other error."""
    if "torch" not in sys.modules:
        return None
    from pgprune_cli.model.out_of_memory import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    return (
        f"out of memory ({in_short(error, 200)}). Stop other programs on the device, use more devices, or set "
        "weight_format to int8. `pgprune search --dry-run` prints what a search needs."
    )
