"""Recipes: what one search is, as frozen dataclasses, and the strict YAML reader that fills them.

The dataclasses are the schema. A key's type, range and choices stand in its annotation and nowhere else; the reader
walks them, so that adding a key is adding one line.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml

from pgprune_cli.errors import UserError

# --- the schema: an `Annotated` type carries checks, each from a value to what is wrong with it ("" if nothing is)


@dataclass(frozen=True)
class Range:
    """Check of a number: low <= value < high, or low < value < high when `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __call__(self, value: float) -> str:
        if (value > self.low or (value == self.low and not self.above)) and value < self.high:
            return ""
        if math.isinf(self.high):
            return f"expected value {'>' if self.above else '>='} {self.low}, got {value}"
        return f"expected {self.low} {'<' if self.above else '<='} value < {self.high}, got {value}"


def _device(value: str) -> str:
    cuda = r"cuda:(0|[1-9][0-9]*)"
    names = value.split(",")
    if re.fullmatch(rf"auto|cpu|cuda|{cuda}(,{cuda})*", value) and len(set(names)) == len(names):
        return ""
    return f"expected auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1, got {_text(value)}"


def _disjoint(families: tuple[str, ...]) -> str:
    """No parameter may be in two families: their masks would contradict each other."""
    for one, other in combinations(families, 2):
        if "layer" in (one, other) or one.removesuffix("-block") == other.removesuffix("-block"):
            return f"{one} and {other} hold the same parameters, keep one of them"
    return ""


Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Length = Annotated[int, Range(2)]  # tokens; a window of one token predicts nothing
Positive = Annotated[float, Range(0, above=True)]
Family = Literal["attention", "ffn", "attention-block", "ffn-block", "layer"]
MetricName = Literal["wanda-sp", "magnitude", "random", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text the search measures losses on."""

    corpus: str  # a corpus name, or a file
    sequences: Count = 120_000  # at most this many windows are searched over
    seqlen: Length = 128  # tokens a window
    batch: Count = 8  # windows a step
    heldout: Count = 32  # windows set aside to judge the hard mask, never searched on


@dataclass(frozen=True, kw_only=True)
class Units:
    """What is kept or removed as a whole: KV groups, FFN channels, sub-layers or decoder layers."""

    families: Annotated[tuple[Family, ...], _disjoint] = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much goes: a fraction of the prunable parameters, of each family or of all families together."""

    sparsity: Annotated[float, Range(0, 1)]
    scope: Literal["per-family", "global"] = "per-family"


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """The metric that seeds the policy, and the calibration text it reads."""

    metric: MetricName = "wanda-sp"
    sequences: Count = 128
    seqlen: Length = 1024  # tokens a window


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How the saliency becomes the starting theta."""

    start: Literal["sigmap", "linear"] = "sigmap"
    temperature: Positive = 1.0  # below 1 the start is surer of the saliency's order


@dataclass(frozen=True, kw_only=True)
class Search:
    """The loop over theta; it costs steps × samples forward passes of one batch."""

    estimator: Literal["paper", "rloo"] = "rloo"
    steps: Natural = 15_000
    samples: Length = 2  # masks a step; the estimators compare them, so one is not enough
    learning_rate: Positive = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    checkpoint_every: Count = 100  # steps
    evaluate_every: Count = 100  # steps


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The perplexities reported, one for each corpus and window length (tokens)."""

    corpora: tuple[str, ...] = ("wikitext2",)
    seqlen: tuple[Length, ...] = (128, 2048)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One search. A `device` of several (`cuda:0,cuda:1`) spreads the layers over them."""

    model: str  # a hub name, a directory, a GGUF file or its directory, or "demo"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "bfloat16"
    device: Annotated[str, _device] = "auto"
    seed: Annotated[int, Range(0, 2**32)] = 0
    calibration: Calibration
    units: Units = Units()
    budget: Budget
    saliency: Saliency = Saliency()
    policy: Policy = Policy()
    search: Search = Search()
    evaluation: Evaluation = Evaluation()


def _walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Every key of a section, dotted: (key, type, required); a section comes as a key of its own, never required."""
    for entry in fields(section):
        key, required = prefix + entry.name, entry.default is MISSING
        if is_dataclass(entry.type):
            yield key, entry.type, False
            yield from _walk(entry.type, f"{key}.")
        else:
            yield key, entry.type, required


_KINDS = {key: kind for key, kind, _ in _walk(Recipe)}
_REQUIRED = [key for key, _, required in _walk(Recipe) if required]

# --- public


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and then `overrides` ("search.steps=200", the value in YAML; the last one wins).

    Raises:
        UserError: with every fault found, a line each; a fault in a value that is overridden counts too.
    """
    reader = _Reader()
    reader.file(path, ())
    for override in overrides:
        reader.override(override)
    if reader.complete:
        for key in (key for key in _REQUIRED if key not in reader.values):
            reader.fault(f"{_shown(path)}: {key}: required key is missing")
    if reader.faults:
        raise UserError("\n".join(reader.faults))
    return cast(Recipe, _build(Recipe, reader.values))


def find(name_or_path: str) -> Path:
    """Path of a recipe: an existing .yaml file, else the shipped recipe of that name (with or without .yaml).

    Raises:
        UserError: nothing of that name; the message has the nearest shipped names.
    """
    path = Path(name_or_path)
    if path.suffix == ".yaml" and _is_file(path):
        return path
    by_name = {recipe.stem: recipe for recipe in shipped()}
    name = name_or_path.removesuffix(".yaml")
    if name in by_name:
        return by_name[name]
    hint = _nearest(Path(name).name, by_name, most=3) or ";"
    raise UserError(_line(f"{name_or_path}: no such recipe{hint} `pgprune recipes` lists those that ship"))


def shipped() -> list[Path]:
    """The recipes that come with pgprune, sorted; bases (`_*.yaml`), which only others extend, are not among them."""
    return sorted(path for path in _shipped_folder().glob("*.yaml") if not path.name.startswith("_"))


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, nothing left to defaults; `load` reads it back to an equal one."""
    return yaml.dump(asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def summary(path: Path) -> str:
    """What a recipe says of itself in its opening comment's first line; "" where it has none.

    Raises:
        UserError: the file cannot be read.
    """
    first = next((line for line in _read(path).splitlines() if line.strip()), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def digest(recipe: Recipe) -> str:
    """SHA-256 (hexadecimal) of the dump: equal for recipes that mean the same, wherever their values stood."""
    return hashlib.sha256(dump(recipe).encode()).hexdigest()


# --- the reader

_Place = Callable[[yaml.Node, str], str]  # where a key stands, as a fault's line begins


@dataclass
class _Reader:
    """Values by dotted key, later sources over earlier ones, and every fault met on the way."""

    values: dict[str, Any] = field(default_factory=dict)  # None where the value given was at fault
    faults: list[str] = field(default_factory=list)
    complete: bool = True  # False once a file could not be read: what is missing may have been in it

    def fault(self, text: str) -> None:
        self.faults.append(_line(text))

    def file(self, path: Path, chain: tuple[Path, ...]) -> None:
        """Read what a file extends, then the file itself; `chain` holds the files that led here, resolved."""
        try:
            root = _compose(_read(path), lambda line: f"{_shown(path)}:{line}")
            if not isinstance(root, yaml.MappingNode):
                raise UserError(f"{_shown(path)}: expected keys with values, got {_kind(root)}")
        except UserError as error:
            self.complete = False
            return self.fault(str(error))

        def place(node: yaml.Node, key: str) -> str:
            return f"{_shown(path)}:{node.start_mark.line + 1}: {key or 'a recipe'}"

        for base in [value for key, value in root.value if key.value == "extends"][:1]:
            self.extend(path, (*chain, path.resolve()), base, place(base, "extends"))
        return self.section(root, "", place, {})

    def extend(self, path: Path, chain: tuple[Path, ...], node: yaml.Node, where: str) -> None:
        name = _value(str, node, lambda _, problem: self.fault(f"{where}: {problem}"))
        folders = (path.parent, _shipped_folder())
        tries = [folder / file for folder in folders for file in (f"{name}", f"{name}.yaml")]
        base = next((file for file in tries if name and _is_file(file)), None)
        if base and base.resolve() not in chain:
            return self.file(base, chain)
        self.complete = False
        if base:
            circle = [file.name for file in (*chain[chain.index(base.resolve()) :], base)]
            self.fault(f"{where}: a circle, {' extends '.join(circle)}")
        elif name:
            there = [file.stem for folder in folders for file in sorted(folder.glob("*.yaml"))]
            self.fault(f"{where}: no such file, got {_text(name)}{_nearest(name, there)}")
        return None

    def override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if not equals or key.strip() == "extends":
            return self.fault(f"--set {text}: expected KEY=VALUE with a recipe's key, such as search.steps=200")
        try:
            node = _compose(value, lambda _: f"--set {text}") or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except UserError as error:
            return self.fault(str(error))
        if node.end_mark and value[node.end_mark.index :].strip():  # YAML would drop "#2" of "file #2" without a word
            return self.fault(f"--set {text}: a comment after the value; put the value in quotes if # belongs to it")
        return self.entry(key.strip(), node, node, lambda *_: f"--set {text}", {})

    def section(self, node: yaml.Node, prefix: str, place: _Place, first: dict[str, yaml.Node]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return self.fault(f"{place(node, prefix[:-1])}: expected keys with values, got {_kind(node)}")
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode):
                self.entry(prefix + name.value, name, value, place, first)
            else:
                self.fault(f"{place(name, prefix[:-1])}: expected a key, got {_kind(name)}")
        return None

    def entry(self, key: str, name: yaml.Node, value: yaml.Node, place: _Place, first: dict[str, yaml.Node]) -> None:
        """One key with its value; `first` holds the keys already met in this source."""
        if key in first:
            self.fault(f"{place(name, key)}: given twice, first on line {first[key].start_mark.line + 1}")
        elif key in _KINDS and is_dataclass(_KINDS[key]):
            self.section(value, f"{key}.", place, first)
        elif key in _KINDS:
            self.values[key] = _value(_KINDS[key], value, lambda at, fault: self.fault(f"{place(at, key)}: {fault}"))
        elif key != "extends":  # which was read before the rest
            self.fault(f"{place(name, key)}: {_unknown(key)}")
        first.setdefault(key, name)


def _value(kind: Any, node: yaml.Node, report: Callable[[yaml.Node, str], None]) -> Any:
    """The node as a value of the annotated type `kind`; None, once reported, where it is not one."""
    origin, args, scalar = get_origin(kind), get_args(kind), _scalar(node)
    if origin is Annotated:
        value = _value(args[0], node, report)
        problem = "" if value is None else args[1](value)
        if problem:
            report(node, problem)
        return None if problem else value
    if origin is tuple and isinstance(node, yaml.SequenceNode):
        items = [_value(args[0], item, report) for item in node.value]
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
        expected, value = _either(args), scalar if scalar in args else None
        hint = _nearest(scalar, args) if isinstance(scalar, str) else ""
    elif kind is str:
        expected, value = "text", scalar if isinstance(scalar, str) and scalar.strip() else None
        hint = "; put it in quotes" if isinstance(scalar, int | float) else ""
    elif kind is int:
        expected, value = "an integer", scalar if type(scalar) is int else None
    else:  # float: an integer will do, a boolean (which Python takes for an integer) will not
        number = isinstance(scalar, int | float) and not isinstance(scalar, bool)
        expected, value = "a number", float(cast(float, scalar)) if number else None
    if value is None:
        report(node, f"expected {expected}, got {_kind(node)}{hint}")
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


def _build(section: Any, values: dict[str, Any], prefix: str = "") -> Any:
    nested = {entry.name: entry.type for entry in fields(section) if is_dataclass(entry.type)}
    given = {name: _build(kind, values, f"{prefix}{name}.") for name, kind in nested.items()}
    plain = {entry.name: values[prefix + entry.name] for entry in fields(section) if prefix + entry.name in values}
    return section(**given, **plain)


# --- files and YAML


class _Loader(yaml.SafeLoader):
    """A recipe says what it says where it stands: aliases could only hide that, and no value needs a tag."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            problem = "anchors, aliases and tags are not allowed in a recipe"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Lists in one line, no aliases, and quotes round every text the reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        plain = data.isprintable() and isinstance(_scalar(yaml.ScalarNode("tag:yaml.org,2002:str", data)), str)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')

    def represent_tuple(self, data: tuple[Any, ...]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_representer(tuple, _Dumper.represent_tuple)


def _compose(text: str, place: Callable[[int], str]) -> yaml.Node | None:
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


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(_line(f"{_shown(path)}:{line}: not UTF-8 text")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise UserError(_line(f"{_shown(path)}: cannot be read, {reason}")) from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder closed to us
        return False


def _shipped_folder() -> Path:
    package = Path(__file__).resolve().parent
    folders = [package / "configs", package.parent / "configs"]  # in a wheel, in a checkout
    return next((folder for folder in folders if folder.is_dir()), folders[0])


# --- words


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _line(text: str) -> str:
    """One fault, one line: whatever could break or hide it is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(value: str) -> str:
    return f"text {value!r}" if len(value) <= 60 else f"text {value[:60]!r}..."


def _kind(node: yaml.Node | None) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a mapping" if isinstance(node, yaml.MappingNode) else "a list" if node else "an empty file"
    scalar = _scalar(node)
    if scalar is None or isinstance(scalar, str):
        return "nothing" if scalar is None else _text(scalar)
    return f"the boolean {node.value}" if isinstance(scalar, bool) else str(node.value)


def _either(names: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _nearest(name: str, names: Iterable[str], most: int = 1) -> str:
    near = get_close_matches(name[:80], dict.fromkeys(names), n=most)  # a longer one is slow, and near to nothing
    return f", did you mean {_either(near)}?" if near else ""


def _unknown(key: str) -> str:
    """The nearest key goes by its last name, wherever it lives: "steps" at the top means search.steps."""
    section, _, name = key.rpartition(".")
    keys = [*_KINDS, "extends"]
    last = get_close_matches(name[:80], dict.fromkeys(known.rpartition(".")[2] for known in keys), n=1)
    near = [known for known in keys if known.rpartition(".")[2] in last]
    near = [known for known in near if known.rpartition(".")[0] == section] or near
    if near:
        return f"unknown key, did you mean {_either(near)}?"
    inside = [known.rpartition(".")[2] for known in _KINDS if known.rpartition(".")[0] == section]
    return f"unknown key, expected {_either(inside)}" if inside else "unknown key"
