"""The strict YAML reader of recipes: every fault found, a line each, with file, line and key.

It walks the schema's dataclasses (`recipe.py`), so that adding a key there is all there is to adding a key.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from pgprune_cli.console.suggest import either, near, nearest
from pgprune_cli.errors import UserError
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.strict_yaml import (
    Dumper,
    compose,
    is_file,
    kind_of,
    one_line,
    read_text,
    shown,
    shown_text,
    typed,
)


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
    """Read a recipe, what it extends, and then `overrides` ("search.forward_passes=200", YAML; the last one wins).

    Raises:
        UserError: with every fault found, a line each; a fault in a value that is overridden counts too.
    """
    reader = _Reader()
    reader.file(path, ())
    for override in overrides:
        reader.override(override)
    if reader.complete:
        reader.missing(f"{shown(path)}")
    recipe = reader.recipe()
    if contradictions := _contradictions(recipe):
        raise UserError("\n".join(one_line(f"{shown(path)}: {text}") for text in contradictions))
    return recipe


class UnknownKeys(UserError):  # noqa: N818  (it says what is wrong)
    """A recipe has keys that this version does not know, and no other fault."""


def parse(text: str, where: str) -> Recipe:
    """A recipe from what `dump` wrote. Raises UserError with every fault found, which are said to be in `where`, and
    UnknownKeys where it is sound but for keys of another version."""
    reader = _Reader()
    reader.text(text, where, lambda _, at: reader.fault(f"{at}: a recipe that was written whole extends nothing"))
    if not reader.faults:
        reader.missing(where)
    return reader.recipe()


def find(name_or_path: str) -> Path:
    """Path of a recipe: an existing .yaml file, else the shipped recipe of that name (with or without .yaml).

    Raises:
        UserError: nothing of that name; the message has the nearest shipped names.
    """
    path = Path(name_or_path)
    if path.suffix == ".yaml" and is_file(path):
        return path
    by_name = {name_of(recipe): recipe for recipe in shipped()}
    name = name_or_path.removesuffix(".yaml")
    if name in by_name:
        return by_name[name]
    files = {str(file.with_suffix("")): str(file) for file in path.parent.glob("*.yaml")}
    names = {name: name for name in by_name} | files
    found = near(name, names, most=3) or near(Path(name).name, names, most=3)
    hint = f", did you mean {either([names[one] for one in found])}?" if found else ";"
    raise UserError(one_line(f"{name_or_path}: no such recipe{hint} `pgprune recipes` lists those that ship"))


def shipped() -> list[Path]:
    """The recipes that come with pgprune, sorted; bases (`_*.yaml`), which only others extend, are not among them."""
    return sorted(path for path in shipped_folder().rglob("*.yaml") if not path.name.startswith("_"))


def name_of(path: Path) -> str:
    """What a recipe is called: `llama2-7b-50`, or with its folder `paper/llama2-7b-50` where it ships in one."""
    folder = shipped_folder()
    inside = path.resolve().is_relative_to(folder.resolve())
    if not inside and not path.stem.strip("."):  # runs/.. is not a run directory
        raise UserError(f"{path.name}: a recipe's file needs a name, such as my-model.yaml")
    return (path.resolve().relative_to(folder.resolve()) if inside else Path(path.name)).with_suffix("").as_posix()


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, nothing left to defaults; `load` reads it back to an equal one."""
    return yaml.dump(asdict(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def summary(path: Path) -> str:
    """What a recipe says of itself in its opening comment's first line; "" where it has none.

    Raises:
        UserError: the file cannot be read.
    """
    first = next((line for line in read_text(path).splitlines() if line.strip()), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


# --- the reader

_Place = Callable[[yaml.Node, str], str]  # where a key stands, as a fault's line begins


@dataclass
class _Reader:
    """Values by dotted key, later sources over earlier ones, and every fault met on the way."""

    values: dict[str, Any] = field(default_factory=dict)  # None where the value given was at fault
    faults: list[str] = field(default_factory=list)
    unknown: int = 0  # how many of the faults are keys that are not in the schema
    complete: bool = True  # False once a file could not be read: what is missing may have been in it

    def fault(self, text: str) -> None:
        self.faults.append(one_line(text))

    def missing(self, where: str) -> None:
        for key in (key for key in _REQUIRED if key not in self.values):
            self.fault(f"{where}: {key}: required key is missing")

    def recipe(self) -> Recipe:
        """What was read. Raises UserError with every fault."""
        if self.faults:
            raise (UnknownKeys if len(self.faults) == self.unknown else UserError)("\n".join(self.faults))
        return cast(Recipe, _build(Recipe, self.values))

    def file(self, path: Path, chain: tuple[Path, ...]) -> None:
        """Read what a file extends, then the file itself; `chain` holds the files that led here, resolved."""
        try:
            text = read_text(path)
        except UserError as error:
            self.complete = False
            return self.fault(str(error))
        return self.text(text, f"{shown(path)}", lambda base, at: self.extend(path, (*chain, path.resolve()), base, at))

    def text(self, text: str, where: str, extend: Callable[[yaml.Node, str], None]) -> None:
        """Read the text of a recipe, after `extend` has read the one that it names; `where` begins every fault."""
        try:
            root = compose(text, lambda line: f"{where}:{line}")
            if not isinstance(root, yaml.MappingNode):
                raise UserError(f"{where}: expected keys with values, got {kind_of(root)}")
        except UserError as error:
            self.complete = False
            return self.fault(str(error))

        def place(node: yaml.Node, key: str) -> str:
            return f"{where}:{node.start_mark.line + 1}: {key or 'a recipe'}"

        for base in [value for key, value in root.value if key.value == "extends"][:1]:
            extend(base, place(base, "extends"))
        return self.section(root, "", place, {})

    def extend(self, path: Path, chain: tuple[Path, ...], node: yaml.Node, where: str) -> None:
        name = typed(str, node, lambda _, problem: self.fault(f"{where}: {problem}"))
        folders = (path.parent, shipped_folder())
        tries = [folder / file for folder in folders for file in (f"{name}", f"{name}.yaml")]
        base = next((file for file in tries if name and is_file(file)), None)
        if base and base.resolve() not in chain:
            return self.file(base, chain)
        self.complete = False
        if base:
            circle = [file.name for file in (*chain[chain.index(base.resolve()) :], base)]
            self.fault(f"{where}: a circle, {' extends '.join(circle)}")
        elif name:
            there = [file.stem for folder in folders for file in sorted(folder.glob("*.yaml"))]
            self.fault(f"{where}: no such file, got {shown_text(name)}{nearest(name, there)}")
        return None

    def override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if not equals or key.strip() == "extends":
            return self.fault(
                f"--set {text}: expected KEY=VALUE with a recipe's key, such as search.forward_passes=200"
            )
        try:
            node = compose(value, lambda _: f"--set {text}") or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except UserError as error:
            return self.fault(str(error))
        if node.end_mark and value[node.end_mark.index :].strip():  # YAML would drop "#2" of "file #2" without a word
            return self.fault(f"--set {text}: a comment after the value; put the value in quotes if # belongs to it")
        return self.entry(key.strip(), node, node, lambda *_: f"--set {text}", {})

    def section(self, node: yaml.Node, prefix: str, place: _Place, first: dict[str, yaml.Node]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return self.fault(f"{place(node, prefix[:-1])}: expected keys with values, got {kind_of(node)}")
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode):
                self.entry(prefix + name.value, name, value, place, first)
            else:
                self.fault(f"{place(name, prefix[:-1])}: expected a key, got {kind_of(name)}")
        return None

    def entry(self, key: str, name: yaml.Node, value: yaml.Node, place: _Place, first: dict[str, yaml.Node]) -> None:
        """One key with its value; `first` holds the keys already met in this source."""
        if key in first:
            self.fault(f"{place(name, key)}: given twice, first on line {first[key].start_mark.line + 1}")
        elif key in _KINDS and is_dataclass(_KINDS[key]):
            self.section(value, f"{key}.", place, first)
        elif key in _KINDS:
            self.values[key] = typed(_KINDS[key], value, lambda at, fault: self.fault(f"{place(at, key)}: {fault}"))
        elif key != "extends":  # which was read before the rest
            self.unknown += 1
            self.fault(f"{place(name, key)}: {_unknown(key)}")
        first.setdefault(key, name)


def _build(section: Any, values: dict[str, Any], prefix: str = "") -> Any:
    nested = {entry.name: entry.type for entry in fields(section) if is_dataclass(entry.type)}
    given = {name: _build(kind, values, f"{prefix}{name}.") for name, kind in nested.items()}
    plain = {entry.name: values[prefix + entry.name] for entry in fields(section) if prefix + entry.name in values}
    return section(**given, **plain)


def _contradictions(recipe: Recipe) -> list[str]:
    """What no model could satisfy, though every key for itself is sound."""
    budget, families, found = recipe.budget, recipe.units.families, []
    if budget.measure == "kv-cache" and (ffn := [name for name in families if name in ("ffn", "ffn-block")]):
        attention = [name for name in families if name not in ffn] or ["attention"]
        found.append(
            f"budget.measure: the family {ffn[0]} has no KV cache, so a budget of it cannot say how much of that goes; "
            f"set units.families to [{', '.join(attention)}]"
        )
    if budget.min_keep:
        if whole := [name for name in families if name not in ("attention", "ffn")]:
            found.append(
                f"budget.min_keep: {whole[0]} is one unit a layer, and a part of it would be all of it; "
                "leave the key at 0"
            )
        elif budget.min_keep + budget.sparsity > 1 + 1e-9:
            found.append(
                f"budget.min_keep: {budget.min_keep} of every layer is more than budget.sparsity "
                f"{budget.sparsity} leaves; lower one of them"
            )
    return found


def shipped_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    folders = [package / "configs", package.parent / "configs"]  # in a wheel, in a checkout
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _unknown(key: str) -> str:
    """The nearest key goes by its last name, wherever it lives: "forward_passes" at the top means search.forward_passes.

    One of the same section comes first, and alone where no other section has a nearer one.
    """
    section, _, name = key.rpartition(".")
    lasts = {known: known.rpartition(".")[2] for known in (*_KINDS, "extends")}
    inside = [known for known in lasts if known.rpartition(".")[0] == section]
    here, anywhere = near(name, (lasts[known] for known in inside)), near(name, lasts.values())
    meant = [known for known in inside if lasts[known] in here]
    if here != anywhere:
        meant += [known for known in lasts if lasts[known] in anywhere]
    if meant:
        return f"unknown key, did you mean {either(meant)}?"
    known = [lasts[known] for known in inside if known != "extends"]
    return f"unknown key, expected {either(known)}" if known else "unknown key"
