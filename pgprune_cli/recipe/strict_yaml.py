"""Read strict YAML into typed values with one error line per fault, and write it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml

from pgprune_cli.console.suggest import either, nearest
from pgprune_cli.errors import UserError


def may_be_empty(_: str) -> str:
    """Mark a text that may be empty, as the check of its annotation. All other texts may not."""
    return ""


def typed(kind: Any, node: yaml.Node, report: Callable[[yaml.Node, str], None]) -> Any:
    """Return the value of a node as the annotated type `kind`, or report the fault and return None."""
    origin, args, scalar = get_origin(kind), get_args(kind), _scalar(node)
    if origin is Annotated and args[1] is may_be_empty and scalar == "":
        return scalar
    if origin is Annotated:
        value = typed(args[0], node, report)
        problem = "" if value is None else args[1](value)
        if problem:
            report(node, problem)
        return None if problem else value
    if origin is tuple and isinstance(node, yaml.SequenceNode):
        items = [typed(args[0], item, report) for item in node.value]
        if None in items:
            return None
        if not items or len(set(items)) < len(items):
            report(node, "an item is listed twice" if items else "expected at least one item, got an empty list")
            return None
        return tuple(items)
    hint = ""
    if origin is tuple:
        is_number = int in (args[0], *get_args(args[0]))
        expected, value = f"a list such as {'[128, 2048]' if is_number else '[a, b]'}", None
    elif origin is Literal:
        choices = [choice_text(choice) for choice in args]
        # Compare types too: in Python, 1 equals True.
        value = next((choice for choice in args if choice == scalar and type(choice) is type(scalar)), None)
        expected, hint = either(choices), nearest(scalar, choices) if isinstance(scalar, str) else ""
    elif kind is str:
        expected, value = "text", scalar if isinstance(scalar, str) and scalar.strip() else None
        hint = ". Put it in quotes." if isinstance(scalar, int | float) else ""
    elif kind is bool:
        expected, value = "true or false", scalar if isinstance(scalar, bool) else None
    elif kind is int:
        expected, value = "an integer", scalar if type(scalar) is int else None
    else:  # float; an integer is accepted, a boolean is not, though it is an int in Python
        number = isinstance(scalar, int | float) and not isinstance(scalar, bool)
        expected, value = "a number", float(cast(float, scalar)) if number else None
    if value is None:
        report(node, f"expected {expected}, got {kind_of(node)}{hint}")
    return value


def choice_text(choice: str | bool) -> str:
    """Return one of the values of a key as YAML has it: `true`, not `True`."""
    return choice if isinstance(choice, str) else str(choice).lower()


def _scalar(node: yaml.Node | None) -> str | int | float | bool | None:
    """Return a scalar as people read it: 2e-3 is a number (text in YAML 1.1); 1:30, .nan and 0x1F are text."""
    if not isinstance(node, yaml.ScalarNode) or (not node.style and node.tag == "tag:yaml.org,2002:null"):
        return None
    if node.style:  # quoted
        return str(node.value)
    if node.tag == "tag:yaml.org,2002:bool":
        return node.value.lower() in ("yes", "true", "on")
    if re.fullmatch(r"[-+]?(0|[1-9](_?[0-9]){0,30})", node.value):
        return int(node.value)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", node.value):
        return float(node.value) if math.isfinite(float(node.value)) else str(node.value)
    return str(node.value)


class _Loader(yaml.SafeLoader):
    """Refuses anchors, aliases and tags: a recipe states every value where it applies."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            problem = "anchors, aliases and tags are not allowed in a recipe"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Writes lists on one line, no aliases, and quotes around text that would be read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        plain = data.isprintable() and isinstance(_scalar(yaml.ScalarNode("tag:yaml.org,2002:str", data)), str)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')

    def represent_tuple(self, data: tuple[Any, ...]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


Dumper.add_representer(str, Dumper.represent_str)
Dumper.add_representer(tuple, Dumper.represent_tuple)


def to_yaml(value: Any) -> str:
    """Return a plain value or a list as YAML on one line, quoted if it would be read as another type."""
    text: str = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def compose(text: str, place: Callable[[int], str]) -> yaml.Node | None:
    """Return the root node of a YAML text, None if it is empty. Raises UserError that starts with `place(line)`."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        if mistake := _common_mistake(error, text.splitlines()):
            raise UserError(f"{place(mistake[0])}: {mistake[1]}") from None
        line, problem = error.problem_mark.line + 1 if error.problem_mark else 1, error.problem
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed"
    except RecursionError:
        line, problem = 1, "it is nested too deeply"
    except (ValueError, OverflowError) as error:  # faults inside PyYAML, for example with "\\UFFFFFFFF"
        line, problem = 1, str(error)
    raise UserError(f"{place(line)}: cannot be read as YAML, {problem}")


_NO_SPACE = re.compile(r"\s*(\w+):(\S.*)")
_TWO_COLONS = re.compile(r"\s*[\w.]+: .*: .*")


def _common_mistake(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str] | None:
    """Return the line of a mistake that people often make, and what to do about it. None for any other."""
    at = error.problem_mark.line if error.problem_mark else 0
    if error.problem == "found character '\\t' that cannot start any token":
        return at + 1, "indent with spaces, not tabs"
    if error.problem == "could not find expected ':'" and error.context_mark:  # found on a later line
        numbers = [error.context_mark.line]
    elif error.problem == "mapping values are not allowed here":  # a key without a space may be on the line before
        numbers = [at - 1, at]
    else:
        return None
    for number in (number for number in numbers if 0 <= number < len(lines)):
        if advice := without_space(lines[number]):
            return number + 1, advice
    return (at + 1, 'put a value with ": " in quotes') if _TWO_COLONS.fullmatch(lines[at]) else None


def without_space(text: str) -> str:
    """Return what to write in place of `key:value`, "" if the text is something else."""
    found = _NO_SPACE.fullmatch(text)
    return f'write "{found[1]}: {found[2][:60]}", with a space' if found else ""


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises UserError if it cannot be read."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(one_line(f"{shown(path)}:{line}: not UTF-8 text")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise UserError(one_line(f"{shown(path)}: cannot be read, {reason}")) from None


def is_file(path: Path) -> bool:
    """Return whether the path is a file that can be reached."""
    try:
        return path.is_file()
    except OSError:  # the name is too long, or a folder is not accessible
        return False


def shown(path: Path) -> Path:
    """Return the path as error messages show it: relative to the working directory if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def one_line(text: str) -> str:
    """Escape everything that is not printable, so that a fault stays on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_text(value: str) -> str:
    """Return a text value for an error message, cut after 60 characters."""
    return f"text {value!r}" if len(value) <= 60 else f"text {value[:60]!r}..."


def kind_of(node: yaml.Node | None) -> str:
    """Return what a node is, for an error message."""
    if not isinstance(node, yaml.ScalarNode):
        return "a mapping" if isinstance(node, yaml.MappingNode) else "a list" if node else "an empty file"
    scalar = _scalar(node)
    if scalar is None or isinstance(scalar, str):
        return "nothing" if scalar is None else shown_text(scalar)
    return f"the boolean {node.value}" if isinstance(scalar, bool) else str(node.value)
