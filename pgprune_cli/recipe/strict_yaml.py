"""Strict YAML: nodes that keep their places, typed values with one clear line for every fault, and the way back."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml

from pgprune_cli.console.suggest import either, nearest
from pgprune_cli.errors import UserError


def typed(kind: Any, node: yaml.Node, report: Callable[[yaml.Node, str], None]) -> Any:
    """The node as a value of the annotated type `kind`; None, once reported, where it is not one."""
    origin, args, scalar = get_origin(kind), get_args(kind), _scalar(node)
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
        expected, value = "a list such as [a, b]", None
    elif origin is Literal:
        expected, value = either(args), scalar if scalar in args else None
        hint = nearest(scalar, args) if isinstance(scalar, str) else ""
    elif kind is str:
        expected, value = "text", scalar if isinstance(scalar, str) and scalar.strip() else None
        hint = "; put it in quotes" if isinstance(scalar, int | float) else ""
    elif kind is int:
        expected, value = "an integer", scalar if type(scalar) is int else None
    else:  # float: an integer will do, a boolean (which Python takes for an integer) will not
        number = isinstance(scalar, int | float) and not isinstance(scalar, bool)
        expected, value = "a number", float(cast(float, scalar)) if number else None
    if value is None:
        report(node, f"expected {expected}, got {kind_of(node)}{hint}")
    return value


def _scalar(node: yaml.Node | None) -> str | int | float | bool | None:
    """A plain value as people read it: 2e-3 is a number (YAML 1.1 has it as text), 1:30 and .nan and 0x1F are not."""
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
    """A recipe says what it says where it stands: aliases could only hide that, and no value needs a tag."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            problem = "anchors, aliases and tags are not allowed in a recipe"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Lists in one line, no aliases, and quotes round every text the reader would take for something else."""

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
    """Return a plain value or a list as YAML on one line, quoted where the reader would take it for something else."""
    text: str = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def compose(text: str, place: Callable[[int], str]) -> yaml.Node | None:
    """The nodes of a YAML text, None of an empty one; raises UserError at `place(line)`."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line, problem = error.problem_mark.line + 1 if error.problem_mark else 1, error.problem
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed"
    except RecursionError:
        line, problem = 1, "brackets in brackets without end"
    except (ValueError, OverflowError) as error:  # PyYAML's own slips, such as "\\UFFFFFFFF"
        line, problem = 1, str(error)
    raise UserError(f"{place(line)}: cannot be read as YAML, {problem}")


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(one_line(f"{shown(path)}:{line}: not UTF-8 text")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise UserError(one_line(f"{shown(path)}: cannot be read, {reason}")) from None


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder closed to us
        return False


def shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def one_line(text: str) -> str:
    """One fault, one line: whatever could break or hide it is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_text(value: str) -> str:
    return f"text {value!r}" if len(value) <= 60 else f"text {value[:60]!r}..."


def kind_of(node: yaml.Node | None) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a mapping" if isinstance(node, yaml.MappingNode) else "a list" if node else "an empty file"
    scalar = _scalar(node)
    if scalar is None or isinstance(scalar, str):
        return "nothing" if scalar is None else shown_text(scalar)
    return f"the boolean {node.value}" if isinstance(scalar, bool) else str(node.value)
