"""Reading YAML into frozen pydantic settings, with the place of every mistake.

One dotted path names a setting everywhere: in a file, in an override `a.b=v`, in a search space, in a tracked
parameter and in an error message. Later layers win: defaults < `extends:` < file < preset < overrides. All mistakes
are collected and shown together, each with file, line, column and the nearest name that exists.
"""

from __future__ import annotations

import difflib
import io
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from setwise.platform.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_NAMES = 40
"""Names that an error lists: a store may have thousands of runs."""
MAX_DEPTH = 100
MAX_NODES = 20_000  # a few lines of nested aliases can expand to billions of nodes


class Settings(BaseModel):
    """Base of every settings class: immutable, and a name it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=BaseModel)
Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value was written: a position in a file, or an override on the command line."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass
class Layer:
    """Values from one source as plain dicts and lists, and the place of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, Place] = field(default_factory=dict)

    def merge(self, later: Layer) -> Layer:
        """This layer with `later` laid over it: mappings are merged key by key, everything else is replaced.

        A mapping that names another `kind` than the one below it is another thing, and replaces it too.
        """
        merged = Layer(_merged(self.values, later.values), dict(self.places))
        for keys in later.places:
            value = _lookup(later.values, keys)
            if not isinstance(value, dict) or _is_another(_lookup(self.values, keys), value):  # what was inside is gone
                for inner in [place for place in merged.places if place[: len(keys)] == keys]:
                    del merged.places[inner]
        merged.places.update(later.places)
        return merged


def _lookup(values: Any, keys: Keys) -> Any:
    """The value at `keys`; None where there is none."""
    for key in keys:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _is_another(below: Any, above: dict[str, Any]) -> bool:
    return isinstance(below, dict) and "kind" in above and "kind" in below and above["kind"] != below["kind"]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _is_another(old, value):
            value = _merged(old, value)
        result[key] = value
    return result


def read_yaml(path: Path) -> Layer:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not YAML, repeats a key, or is not a mapping.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(data):,} bytes; a configuration file may have {MAX_BYTES:,}")
    return parse_yaml(data, str(path))


def parse_yaml(data: bytes, source: str) -> Layer:
    """As `read_yaml`, from bytes; `source` is the name that errors give."""
    try:
        node = YAML(typ="rt").load(io.StringIO(data.decode("utf-8")))
        if node is None:
            return Layer(places={(): Place(source)})
        if not isinstance(node, Mapping):
            raise ConfigError(f"{source}: expected a mapping of settings, found {type(node).__name__}")
        layer = Layer()
        layer.values = _plain(node, source, (), layer.places, [MAX_NODES])
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 (byte {error.start})") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
        problem = (error.problem or "").split("\n")[0]
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    return layer


def _plain(node: Any, source: str, keys: Keys, places: dict[Keys, Place], budget: list[int]) -> Any:
    """Plain Python values of a parsed node; the place of each key goes into `places`."""
    budget[0] -= 1
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"{source}: nested too deeply")
    if budget[0] < 0:
        raise ConfigError(f"{source}: more than {MAX_NODES:,} values; are its aliases nested?")
    tagged = getattr(getattr(node, "tag", None), "value", None) is not None
    if tagged or (isinstance(node, Mapping | list) and type(node).__name__ not in ("CommentedMap", "CommentedSeq")):
        raise ConfigError(f"{source}: {'.'.join(map(str, keys))}: a tagged value is not a plain value")
    if isinstance(node, Mapping):
        result = {}
        for key, value in node.items():
            path = (*keys, str(key))
            places[path] = _position(node, "key", key, source)
            result[str(key)] = _plain(value, source, path, places, budget)
        return result
    if isinstance(node, list):
        items = []
        for index, value in enumerate(node):
            places[*keys, index] = _position(node, "item", index, source)
            items.append(_plain(value, source, (*keys, index), places, budget))
        return items
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    if node is None:
        return None
    raise ConfigError(f"{source}: {'.'.join(map(str, keys))}: {node!r} is not a plain value")


def _position(node: Any, kind: str, key: Any, source: str) -> Place:
    """Where a key or item of a node stands; what a merge key `<<` brought in stands where the node does."""
    try:
        line, column = getattr(node.lc, kind)(key)
    except (KeyError, TypeError, AttributeError):
        line, column = node.lc.line, node.lc.col
    return Place(source, line + 1, column + 1)


def parse_override(text: str) -> Layer:
    """One `a.b=value` of the command line; the value is read as YAML, so `[1, 2]`, `true` and `1e-3` work."""
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"'{text}': an override is written section.setting=value")
    source = f"override '{text}'"
    try:
        parsed = parse_yaml(b"value: " + value.encode(), source)
    except UnicodeEncodeError as error:
        raise ConfigError(f"override {text!r}: not UTF-8") from error
    layer = Layer()
    inner = layer.values
    for depth, key in enumerate(keys[:-1], start=1):
        inner = inner.setdefault(key, {})
        layer.places[keys[:depth]] = Place(source)
    inner[keys[-1]] = parsed.values.get("value")
    for place in parsed.places:
        layer.places[(*keys, *place[1:])] = Place(source)
    return layer


def load_layers(path: Path, find: Callable[[str], Path] | None = None) -> Layer:
    """A file laid over everything that it `extends:` (names are resolved by `find`, then beside the file)."""
    chain: list[Path] = []
    layers: list[Layer] = []
    while True:
        if path.resolve() in chain:
            raise ConfigError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in chain)}")
        chain.append(path.resolve())
        layer = read_yaml(path)
        layers.append(layer)
        parent = layer.values.pop("extends", None)
        place = layer.places.pop(("extends",), None)
        if parent is None:
            break
        beside = path.parent / str(parent)
        try:
            path = beside if beside.is_file() or find is None else find(str(parent))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    result = Layer()
    for layer in reversed(layers):
        result = result.merge(layer)
    return result


def build(model: type[S], layer: Layer, overrides: Sequence[str] = ()) -> S:
    """The settings that `layer` and then `overrides` describe.

    Raises:
        ConfigError: with every mistake found, one paragraph each.
    """
    problems: list[str] = []
    over = Layer()  # first put together, so that their order does not matter where one names another `kind`
    for text in overrides:
        try:
            over = over.merge(parse_override(text))
        except ConfigError as error:
            problems.append(str(error))
    layer = layer.merge(over)
    try:
        settings = model.model_validate(layer.values)
    except ValidationError as error:
        problems += [_explain(model, layer, dict(item)) for item in error.errors()]
    if problems:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError("\n".join([*problems, f"{count}; nothing was started."]))
    return settings


def _explain(model: type[BaseModel], layer: Layer, item: dict[str, Any]) -> str:
    """One mistake as a line: place, dotted name, what is wrong, what is allowed."""
    keys = _data_keys(item["loc"], layer.values)
    name = ".".join(map(str, keys))
    place = place_of(layer, keys)
    if item["type"] == "extra_forbidden":
        nearest = nearest_name(name, dotted_names(model))
        if nearest != name:
            nearest = nearest_name(name, dotted_names(model, layer.values))
        if nearest and nearest.rpartition(".")[0] == ".".join(map(str, keys[:-2])):  # of a section with a free name
            nearest = ".".join([*map(str, keys[:-1]), nearest.rpartition(".")[2]])
        if nearest == name:  # of another kind of section
            sections = (_lookup(layer.values, keys[:length]) for length in range(len(keys) - 1, -1, -1))
            kind = next((one["kind"] for one in sections if isinstance(one, dict) and "kind" in one), None)
            if kind is not None:
                return f"{place}: '{name}' is not a setting where the kind is '{kind}'."
            nearest = nearest_name(name, dotted_names(model, layer.values))
        hint = f" Did you mean '{nearest}'?" if nearest else ""
        return f"{place}: '{name}' is not a setting.{hint}"
    if item["type"] == "missing":
        return f"{place}: '{name}' is required."
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        allowed = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        kind = context["discriminator"].strip("'")
        return f"{place_of(layer, (*keys, kind))}: {name}.{kind}: {no_such(kind, str(context['tag']), allowed)}"
    message = item["msg"].removeprefix("Value error, ").removesuffix(".")
    if not name:  # of a whole file: it begins with the setting that it speaks of, if with any
        place = place_of(layer, tuple(message.partition(": ")[0].split(".")))
    got = "" if isinstance(item["input"], dict | BaseModel) else f", not {item['input']!r}"
    return f"{place}: {name + ': ' if name else ''}{message[:1].lower() + message[1:]}{got}."


def _data_keys(location: Sequence[str | int], values: Any) -> Keys:
    """pydantic's location without the union tags in it, which are no keys of the data."""
    keys: list[str | int] = []
    for index, key in enumerate(location):
        last = index == len(location) - 1
        if isinstance(values, dict) and key in values:
            values = values[str(key)]
        elif isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        elif not last:
            continue
        keys.append(key)
    return tuple(keys)


def place_of(layer: Layer, keys: Keys) -> Place:
    """The place of a key or, where it was not written, of the section around it."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in layer.places:
            return layer.places[keys[:length]]
    sources = {place.source for place in layer.places.values()}
    return Place(sources.pop() if len(sources) == 1 else "configuration")


def dotted_names(model: type[BaseModel], values: Any = None, prefix: str = "") -> Iterator[str]:
    """Every setting of a model and of the models inside it, sections included; with `values`, of a section that may be
    of several kinds only those of the kind that it names, or has unless it names one."""
    for key, info in model.model_fields.items():
        yield prefix + key
        inside = None if values is None else (values.get(key) or {}) if isinstance(values, dict) else {}
        for inner in _of_kind(list(_models_in(info.annotation)), inside):
            yield from dotted_names(inner, inside, f"{prefix}{key}.")


def _of_kind(models: list[type[BaseModel]], section: Any) -> list[type[BaseModel]]:
    """Those of the kind that a section names; else the one that is meant if it names none; else all."""
    if section is None or len(models) < 2:
        return models
    kinds = {model: model.model_fields["kind"] for model in models if "kind" in model.model_fields}
    named = section.get("kind") if isinstance(section, dict) else None
    meant = [one for one, field in kinds.items() if named in typing.get_args(field.annotation)]
    return meant or [one for one, field in kinds.items() if not field.is_required()] or models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def nearest_name(name: str, known: Iterator[str] | Sequence[str]) -> str | None:
    """The known dotted name most like `name`: a setting in the wrong section counts as near, as does a typo."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return 0.3 * whole + 0.7 * last

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) > 0.6 else None


def no_such(what: str, name: str, known: Sequence[str], more: str = "") -> ConfigError:
    """The error for a name that nothing has, with the nearest and all that there are."""
    nearest = nearest_name(name, known)
    hint = f" Did you mean '{nearest}'?" if nearest else ""
    if not known:
        return ConfigError(f"no {what} is called '{name}'; there is none{more}.")
    rest = f", and {len(known) - MAX_NAMES} more" if len(known) > MAX_NAMES else ""
    return ConfigError(f"no {what} is called '{name}'.{hint} There are: {', '.join(known[:MAX_NAMES])}{rest}{more}.")


def names_in(folder: Path) -> list[str]:
    """Names of the YAML files in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_file(what: str, name: str, folder: Path) -> Path:
    """A YAML file by its path, or by its name in `folder`.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"{name}: no such file")
    if name in names_in(folder):
        return folder / f"{name}.yaml"
    raise no_such(what, name, names_in(folder), "; or give a YAML file")


def flatten(settings: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as {dotted name: plain value}, the form that parameters are tracked in."""
    values = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def to_yaml(settings: BaseModel) -> str:
    """Settings, complete with defaults, as YAML that `load_layers` reads back to the same settings."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the fields
    yaml.dump(settings.model_dump(mode="json"), stream)
    return stream.getvalue()
