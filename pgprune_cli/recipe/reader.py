"""Read recipes strictly: collect every fault, one line each, with file, line and key.

The reader walks the dataclasses of `schema.py`, so a key that is added there can be read without a change here.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from pgprune_cli.console.suggest import either, near, nearest
from pgprune_cli.errors import UserError
from pgprune_cli.recipe.contradictions import refuse_contradictions
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
    without_space,
)
from pgprune_cli.storage.paths import expanded


def _walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted key, type, required) for every key of a section. A nested section is a key too, never required."""
    for entry in fields(section):
        key, required = prefix + entry.name, entry.default is MISSING
        if is_dataclass(entry.type):
            yield key, entry.type, False
            yield from _walk(entry.type, f"{key}.")
        else:
            yield key, entry.type, required


_KINDS = {key: kind for key, kind, _ in _walk(Recipe)}
_REQUIRED = [key for key, _, required in _walk(Recipe) if required]

_FORMER = {"repair.last_layer": ("repair.last_layers", {"outputs": "0", "predictions": "1"})}
"""Keys of earlier versions, which recipes and runs may still have: the key of today, and its values by theirs."""

# --- public


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, the recipes it extends, and `overrides` ("search.forward_passes=200", the last one wins).

    Raises:
        UserError: with every fault, one line each. A fault in a value that is overridden counts too. A recipe that
            cannot work with any model is refused as well.
    """
    reader = _Reader()
    reader.file(path, ())
    for override in overrides:
        reader.override(override)
    if reader.complete:
        reader.missing(f"{shown(path)}")
    recipe = reader.recipe()
    refuse_contradictions(recipe, f"{shown(path)}")
    return recipe


class UnknownKeys(UserError):  # noqa: N818  (it says what is wrong)
    """The only faults of a recipe are keys that this version does not know."""


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the text that `dump` wrote, and `overrides` as `load` takes them. `where` is the place that faults name.

    Without overrides, contradictions are not checked: the recipe was checked when it was first read.

    Raises:
        UnknownKeys: the only faults are keys that this version does not know.
        UserError: with every other fault, one line each.
    """
    reader = _Reader()
    reader.text(text, where, lambda _, at: reader.fault(f"{at}: a resolved recipe cannot extend another"))
    for override in overrides:
        reader.override(override)
    if not reader.faults:
        reader.missing(where)
    recipe = reader.recipe()
    if overrides:
        refuse_contradictions(recipe, where)
    return recipe


def find(name_or_path: str) -> Path:
    """Return the path of a recipe: an existing .yaml file, or the shipped recipe of that name.

    Raises:
        UserError: there is no such recipe. The message suggests the nearest names.
    """
    if not name_or_path.strip():
        raise UserError("the name of the recipe is empty. `pgprune recipes` lists the shipped recipes.")
    path = expanded(name_or_path)
    if path.suffix == ".yaml" and is_file(path):
        return path
    if path.suffix.lower() in (".yaml", ".yml") and is_file(path):
        raise UserError(one_line(f"{path}: not read as a recipe, because recipe files end in .yaml. Rename it."))
    shipped_names = {name_of(recipe): recipe for recipe in shipped()}
    name = name_or_path.removesuffix(".yaml")
    if name in shipped_names:
        return shipped_names[name]
    if path.suffix.lower() in (".yaml", ".yml") and os.path.lexists(path):
        kind = "a directory" if path.is_dir() else "a special file or a broken link"
        raise UserError(one_line(f"{name_or_path}: {kind}, not a recipe file."))
    files = {str(file.with_suffix("")): str(file) for file in path.parent.glob("*.yaml")}
    names = {name: name for name in shipped_names} | files
    similar = near(name, names, most=3) or near(Path(name).name, names, most=3)
    hint = f", did you mean {either([names[key] for key in similar])}?" if similar else "."
    raise UserError(one_line(f"{name_or_path}: no such recipe{hint} `pgprune recipes` lists the shipped recipes."))


def shipped() -> list[Path]:
    """Return the recipes that ship with pgprune, sorted, without the bases (`_*.yaml`) that they extend."""
    return sorted(path for path in shipped_folder().rglob("*.yaml") if not path.name.startswith("_"))


def name_of(path: Path) -> str:
    """Return the name of a recipe file, such as `llama2-7b-50`; or `paper/llama2-7b-50` if it is in a folder.

    Raises:
        UserError: the file has no name, as in `runs/..`.
    """
    folder = shipped_folder()
    is_shipped = path.resolve().is_relative_to(folder.resolve())
    if not is_shipped and not path.stem.strip("."):
        raise UserError(f"{path.name}: a recipe file needs a name, such as my-model.yaml")
    return (path.resolve().relative_to(folder.resolve()) if is_shipped else Path(path.name)).with_suffix("").as_posix()


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML with every key. `load` reads it back to an equal recipe."""
    return yaml.dump(asdict(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def by_key(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a recipe or a section of it by dotted key, in the order of the schema. Tuples are lists."""
    values: dict[str, Any] = {}
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            values |= by_key(value, f"{prefix}{entry.name}.")
        else:
            values[prefix + entry.name] = list(value) if isinstance(value, tuple) else value
    return values


def summary(path: Path) -> str:
    """Return the first line of a recipe's opening comment, or "" without one.

    Raises:
        UserError: the file cannot be read.
    """
    first = next((line for line in read_text(path).splitlines() if line.strip()), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


# --- the reader

_Place = Callable[[yaml.Node, str], str]
"""Returns the place of a key, which begins the line of a fault."""


@dataclass
class _Reader:
    """Collects values by dotted key, where later sources override earlier ones, and all faults.

    values: None for a key whose value is invalid; unknown: number of faults that are unknown keys; complete: False if
    a file could not be read, which may hold the keys that are missing.
    """

    values: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unknown: int = 0
    complete: bool = True

    def fault(self, text: str) -> None:
        self.faults.append(one_line(text))

    def missing(self, where: str) -> None:
        for key in (key for key in _REQUIRED if key not in self.values):
            self.fault(f"{where}: {key}: required key is missing")

    def recipe(self) -> Recipe:
        """Return the recipe that was read. Raise UserError with every fault."""
        if self.faults:
            raise (UnknownKeys if len(self.faults) == self.unknown else UserError)("\n".join(self.faults))
        return cast(Recipe, _build(Recipe, self.values))

    def file(self, path: Path, chain: tuple[Path, ...]) -> None:
        """Read the base of a file, then the file. `chain` holds the resolved paths of the files that extend it."""
        try:
            text = read_text(path)
        except UserError as error:
            self.complete = False
            return self.fault(str(error))
        return self.text(text, f"{shown(path)}", lambda base, at: self.extend(path, (*chain, path.resolve()), base, at))

    def text(self, text: str, where: str, extend: Callable[[yaml.Node, str], None]) -> None:
        """Read the text of a recipe after `extend` has read its base. Every fault begins with `where`."""
        try:
            root = compose(text, lambda line: f"{where}:{line}")
            if not isinstance(root, yaml.MappingNode):
                raise UserError(f"{where}: {_no_keys(root)}")
        except UserError as error:
            self.complete = False
            return self.fault(str(error))

        def place(node: yaml.Node, key: str) -> str:
            return f"{where}:{node.start_mark.line + 1}: {key or 'a recipe'}"

        for base in [value for key, value in root.value if key.value == "extends"][:1]:
            extend(base, place(base, "extends"))
        return self.section(root, "", place, {})

    def extend(self, path: Path, chain: tuple[Path, ...], node: yaml.Node, where: str) -> None:
        """Read the base that `path` names in `node`: a file beside it, or a shipped one."""
        name = typed(str, node, lambda _, problem: self.fault(f"{where}: {problem}"))
        folders = (path.parent, shipped_folder())
        candidates = [folder / file for folder in folders for file in (f"{name}", f"{name}.yaml")]
        base = next((file for file in candidates if name and is_file(file)), None)
        if base and base.resolve() not in chain:
            return self.file(base, chain)
        self.complete = False
        if base:
            circle = [file.name for file in (*chain[chain.index(base.resolve()) :], base)]
            self.fault(f"{where}: recipes extend each other in a circle: {' extends '.join(circle)}")
        elif name:
            existing = [file.stem for folder in folders for file in sorted(folder.glob("*.yaml"))]
            self.fault(f"{where}: no such file, got {shown_text(name)}{nearest(name, existing)}")
        return None

    def override(self, text: str) -> None:
        """Read one KEY=VALUE of --set."""
        key, equals, value = text.partition("=")
        if key.strip() == "extends":
            return self.fault(f"--set {text}: extends works only in a file")
        if not equals:
            return self.fault(
                f"--set {text}: expected KEY=VALUE with a key of the recipe, such as search.forward_passes=200"
            )
        try:
            node = compose(value, lambda _: f"--set {text}") or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except UserError as error:
            return self.fault(str(error))
        if node.end_mark and value[node.end_mark.index :].strip():  # YAML would silently drop "#2" of "file #2"
            return self.fault(f"--set {text}: # starts a comment. Put the value in quotes if # belongs to it.")
        return self.entry(key.strip(), node, node, lambda *_: f"--set {text}", {})

    def section(self, node: yaml.Node, prefix: str, place: _Place, first: dict[str, yaml.Node]) -> None:
        """Read every key of a mapping; `prefix` is its dotted name with a dot, "" at the top."""
        if not isinstance(node, yaml.MappingNode):
            return self.fault(f"{place(node, prefix[:-1])}: {_no_keys(node)}")
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode):
                self.entry(prefix + name.value, name, value, place, first)
            else:
                self.fault(f"{place(name, prefix[:-1])}: expected a key, got {kind_of(name)}")
        return None

    def entry(self, key: str, name: yaml.Node, value: yaml.Node, place: _Place, first: dict[str, yaml.Node]) -> None:
        """Read one key with its value. `first` holds the keys already read from this source."""
        if key in _FORMER:
            key, values = _FORMER[key]
            if isinstance(value, yaml.ScalarNode) and value.value in values:
                value = yaml.ScalarNode("tag:yaml.org,2002:int", values[value.value], value.start_mark, value.end_mark)
        if key in first:
            self.fault(f"{place(name, key)}: given twice, first on line {first[key].start_mark.line + 1}")
        elif key in _KINDS and is_dataclass(_KINDS[key]):
            self.section(value, f"{key}.", place, first)
        elif key in _KINDS:
            self.values[key] = typed(_KINDS[key], value, lambda at, fault: self.fault(f"{place(at, key)}: {fault}"))
        elif key != "extends":  # the base was read first
            self.unknown += 1
            self.fault(f"{place(name, key)}: {_unknown(key)}")
        first.setdefault(key, name)


def _build(section: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """Return the dataclass `section` filled from the values by dotted key."""
    nested = {entry.name: entry.type for entry in fields(section) if is_dataclass(entry.type)}
    sections = {name: _build(kind, values, f"{prefix}{name}.") for name, kind in nested.items()}
    plain = {entry.name: values[prefix + entry.name] for entry in fields(section) if prefix + entry.name in values}
    return section(**sections, **plain)


def shipped_folder() -> Path:
    """Return the folder of the shipped recipes, in an installed wheel or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folders = [package / "configs", package.parent / "configs"]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _no_keys(node: yaml.Node | None) -> str:
    """Return the error text for what stands in place of keys with values."""
    advice = without_space(node.value) if isinstance(node, yaml.ScalarNode) else ""
    return advice or f"expected keys with values, got {kind_of(node)}"


def _unknown(key: str) -> str:
    """Return the error text for an unknown key, with the keys it may mean.

    Only the last part of a key is compared, because a key may be written in the wrong section: `forward_passes` at the
    top means `search.forward_passes`. Keys of the same section come first.
    """
    section, _, name = key.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in (*_KINDS, "extends")}
    same_section = [known for known in names if known.rpartition(".")[0] == section]
    near_here, near_anywhere = near(name, (names[known] for known in same_section)), near(name, names.values())
    meant = [known for known in same_section if names[known] in near_here]
    if near_here != near_anywhere:
        meant += [known for known in names if names[known] in near_anywhere]
    if meant:
        return f"unknown key, did you mean {either(meant)}?"
    choices = [names[known] for known in same_section if known != "extends"]
    return f"unknown key, expected {either(choices)}" if choices else "unknown key"
