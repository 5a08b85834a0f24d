"""Configuration: every mistake has its place and the name that was meant, and later layers win."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from setwise.platform import config
from setwise.platform.config import Layer, Settings
from setwise.platform.errors import ConfigError


class Sgd(Settings):
    kind: Literal["sgd"]
    momentum: float = Field(0.9, ge=0, lt=1)


class Adam(Settings):
    kind: Literal["adam"]
    beta: float = 0.999


class Inner(Settings):
    width: int = Field(8, ge=1)
    names: tuple[str, ...] = ()


class Outer(Settings):
    inner: Inner = Inner()
    depth: int = Field(2, ge=1)


class Training(Settings):
    lr: float = Field(0.1, gt=0, le=1)
    epochs: int = 3
    workers: int = 1

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.epochs % self.workers:
            raise ValueError(f"epochs {self.epochs} cannot be divided among {self.workers}")
        return self


class Whole(Settings):
    outer: Outer = Outer()
    optimizer: Annotated[Sgd | Adam, Field(discriminator="kind")] = Sgd(kind="sgd")
    training: Training = Training()
    notes: dict[str, int] = Field(default_factory=dict)
    title: str | None = None
    flag: bool = False
    scales: list[float] = Field(default_factory=list)


def load(tmp_path: Path, text: str, *overrides: str) -> Whole:
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return config.build(Whole, config.load_layers(path), list(overrides))


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The mistakes of a file, one line each, without its folder and the count at the end."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    *lines, count = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert count == f"{len(lines)} mistake{'s' * (len(lines) > 1)}; nothing was started."
    return lines


# --- mistakes have a place and a name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "named", "meant"),
    [
        ("training:\n  epocs: 3\n", "file.yaml:2:3", "training.epocs", "training.epochs"),
        ("trianing: {epochs: 3}\n", "file.yaml:1:1", "trianing", "training"),
        ("training: {epochs: 3, wokers: 1}\n", "file.yaml:1:23", "training.wokers", "training.workers"),
        ("outer:\n  inner:\n    widht: 3\n", "file.yaml:3:5", "outer.inner.widht", "outer.inner.width"),
        ("outer:\n  width: 3\n", "file.yaml:2:3", "outer.width", "outer.inner.width"),  # one section too high
        ("outer:\n  lr: 0.5\n", "file.yaml:2:3", "outer.lr", "training.lr"),  # in the wrong section
        ("lr: 0.5\n", "file.yaml:1:1", "lr", "training.lr"),
        ("optimizer: {kind: sgd, momentm: 0.5}\n", "file.yaml:1:24", "optimizer.momentm", "optimizer.momentum"),
    ],
)
def test_a_typo_names_its_place_and_what_was_meant(
    tmp_path: Path, text: str, place: str, named: str, meant: str
) -> None:
    (line,) = mistakes(tmp_path, text)
    assert line == f"{place}: '{named}' is not a setting. Did you mean '{meant}'?"


def test_what_resembles_nothing_gets_no_guess(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "zzqq: 3\n") == ["file.yaml:1:1: 'zzqq' is not a setting."]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training:\n  lr: 2\n", "file.yaml:2:3: training.lr: input should be less than or equal to 1, not 2."),
        ("training:\n  epochs: many\n", r"file.yaml:2:3: training.epochs: input should be a valid integer.*'many'\."),
        ("training: 3\n", r"file.yaml:1:1: training: .*not 3\."),
        ("training: {epochs: 3, workers: 2}\n", "file.yaml:1:1: training: epochs 3 cannot be divided among 2."),
        ("outer:\n  inner: {names: [a, 3]}\n", r"file.yaml:2:22: outer.inner.names.1: input should be a valid string"),
        ("optimizer:\n  momentum: 0.5\n", r"file.yaml:1:1: optimizer: .*kind"),
        (
            "optimizer:\n  kind: adm\n",
            r"file.yaml:2:3: optimizer.kind: no kind .* Did you mean 'adam'\? There are: sgd, adam\.$",
        ),
        ("optimizer: {kind: sgd, momentum: 7}\n", r"file.yaml:1:24: optimizer.momentum: .*less than 1, not 7\."),
        ("notes: {a: x}\n", r"file.yaml:1:9: notes.a: .*integer"),
    ],
)
def test_a_wrong_value_names_its_place_and_what_is_allowed(tmp_path: Path, text: str, line: str) -> None:
    (found,) = mistakes(tmp_path, text)
    assert re.match(line, found), found


def test_what_is_required_is_named_with_the_section_it_belongs_to(tmp_path: Path) -> None:
    class Strict(Settings):
        section: Sgd

    layer = config.parse_yaml(b"section: {momentum: 0.5}", "f.yaml")
    with pytest.raises(ConfigError, match=r"^f\.yaml:1:1: 'section\.kind' is required\.\n"):
        config.build(Strict, layer)
    with pytest.raises(ConfigError, match=r"'section' is required\.\n"):
        config.build(Strict, Layer())


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    text = "training:\n  epocs: 3\n  lr: 0\nouter: {inner: {width: 0}}\n"
    lines = mistakes(tmp_path, text, "flag=perhaps", "nonsense", "outer.dept=3", "title=[1")
    assert len(lines) == 7
    for expected in (
        "'nonsense'",
        "override 'title=[1'",
        "file.yaml:2:3:",
        "file.yaml:3:3:",
        "file.yaml:4:17:",
        "override 'flag=perhaps'",
        "override 'outer.dept=3': 'outer.dept' is not a setting. Did you mean 'outer.depth'?",
    ):
        assert sum(line.startswith(expected) for line in lines) == 1, expected


def test_an_overridden_list_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "scales: [1, 2]\n", "scales=[1, x]")
    assert line.startswith("override 'scales=[1, x]': scales.1:"), line


def test_an_overridden_section_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "training: {lr: 0.5}\n", "training={lr: 7}")
    assert line.startswith("override 'training={lr: 7}': training.lr:"), line


# --- files that are none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: 1\na: 2\n", r"f\.yaml:2:1: not valid YAML: found duplicate key"),
        (b"t: {a: 1,\n  b: 2,\n  a: 3}\n", r"f\.yaml:3:3: not valid YAML: found duplicate key"),
        (b"a: [1, 2\n", r"f\.yaml:\d:\d: not valid YAML"),
        (b"a:\n\tb: 1\n", r"f\.yaml:2:1: not valid YAML"),
        (b"a: *nobody\n", r"f\.yaml:1:4: not valid YAML: found undefined alias"),
        (b"a: 1\n---\nb: 2\n", r"f\.yaml:2:1: not valid YAML"),
        (b"a: \x00\n", r"f\.yaml: not valid YAML"),
        (b"a: " + b"1" * 5000, r"f\.yaml: not valid YAML"),
        (b"a: \xff\xfe\n", r"f\.yaml: not UTF-8 \(byte 3\)"),
        ("a: 1\n".encode("utf-16"), r"f\.yaml: not UTF-8"),
        (b"- a\n- b\n", r"f\.yaml: expected a mapping"),
        (b"hello\n", r"f\.yaml: expected a mapping"),
        (b"a: !thing {b: 1}\nb: !thing c\n", r"f\.yaml: a: .*not a plain value"),
        (b"a: 2020-01-01\n", r"f\.yaml: a: .*not a plain value"),
        (b"a: !!binary aGk=\n", r"f\.yaml: a: .*not a plain value"),
        (b"a: !!set {b, c}\n", r"f\.yaml: a: .*not a plain value"),
        (b"a: !!omap [b: 1]\n", r"f\.yaml"),
        (b"a: !!python/object/apply:os.system ['exit 1']\n", r"f\.yaml"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, r"f\.yaml"),
        (b"a: " + b"{b: " * 400 + b"}" * 400, r"f\.yaml"),
    ],
)
def test_bad_yaml_is_a_configuration_error_with_its_file(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse_yaml(data, "f.yaml")


def test_an_alias_bomb_is_refused_quickly() -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for previous, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join([f'*{previous}'] * 10)}]")
    with pytest.raises(ConfigError, match="aliases"):
        config.parse_yaml("\n".join(lines).encode(), "f.yaml")


def test_aliases_and_merge_keys_are_values_like_any_other() -> None:
    assert config.parse_yaml(b"a: &x {b: 1}\nc: *x\n", "f.yaml").values == {"a": {"b": 1}, "c": {"b": 1}}
    merged = config.parse_yaml(b"a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n", "f.yaml")
    assert merged.values == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_gives_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Whole()


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufefftitle: x\n").title == "x"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_yaml(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (config.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=r"1,000,001 bytes"):
        config.read_yaml(big)


# --- extends ----------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_layers_win_in_their_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="training: {lr: 0.1, epochs: 1, workers: 1}\nscales: [1, 2, 3]\n",
        middle="extends: base.yaml\ntraining: {epochs: 2}\n",
        top="extends: middle.yaml\ntraining: {lr: 0.3}\nscales: [9]\n",
    )
    built = config.build(Whole, config.load_layers(tmp_path / "top.yaml"), ["training.lr=0.4"])
    assert (built.training.lr, built.training.epochs, built.outer.depth) == (0.4, 2, 2)
    assert built.scales == [9], "a list is replaced, not appended to"
    last = config.build(Whole, config.load_layers(tmp_path / "top.yaml"), ["training.lr=0.4", "training.lr=0.5"])
    assert last.training.lr == 0.5


def test_a_mistake_in_a_base_file_is_placed_there_and_one_laid_over_it_where_it_is_written(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="training:\n  epocs: 1\n  lr: 0.5\n",
        top="\n\nextends: base.yaml\ntraining: {lr: 7}\n",
    )
    with pytest.raises(ConfigError) as caught:
        config.build(Whole, config.load_layers(tmp_path / "top.yaml"))
    assert f"{tmp_path / 'base.yaml'}:2:3: 'training.epocs'" in str(caught.value)
    assert f"{tmp_path / 'top.yaml'}:4:12: training.lr" in str(caught.value)


@pytest.mark.parametrize("files", [{"a": "extends: a.yaml"}, {"a": "extends: b.yaml", "b": "extends: a.yaml"}])
def test_a_file_that_extends_itself_is_an_error(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=r"extends itself, by way of a\.yaml"):
        config.load_layers(tmp_path / "a.yaml")


def test_extends_takes_a_file_beside_it_before_a_name(tmp_path: Path) -> None:
    def find(name: str) -> Path:
        if name == "known":
            return tmp_path / "shipped.yaml"
        raise ConfigError(f"no recipe is called '{name}'")

    write(tmp_path, shipped="title: shipped", top="flag: true\nextends: known", bad="flag: true\nextends: unknown")
    assert config.load_layers(tmp_path / "top.yaml", find).values == {"title": "shipped", "flag": True}
    with pytest.raises(ConfigError, match=r"bad\.yaml:2:1: no recipe is called 'unknown'"):
        config.load_layers(tmp_path / "bad.yaml", find)
    (tmp_path / "known").write_text("title: beside")
    assert config.load_layers(tmp_path / "top.yaml", find).values["title"] == "beside"


def test_a_base_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, top="extends: nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        config.load_layers(tmp_path / "top.yaml")


# --- overrides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("v=1e-3", 0.001),
        ("v=1E5", 100_000.0),
        ("v=-.5", -0.5),
        ("v=3", 3),
        ("v=true", True),
        ("v=null", None),
        ("v=", None),
        ("v=[1, 2.5, a]", [1, 2.5, "a"]),
        ("v={a: {b: 1}}", {"a": {"b": 1}}),
        ("v=a=b", "a=b"),
        ("v='8'", "8"),
        ("v=yes", "yes"),
        ("v=two words", "two words"),
        ("v=größe", "größe"),
        (" v =3", 3),
    ],
)
def test_the_value_of_an_override_is_read_as_yaml(override: str, value: Any) -> None:
    parsed = config.parse_override(override).values["v"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["v", "=3", "a..b=3", ".a=3", "a.=3", "", "--flag", "a=[1", "a=b: c"])
def test_an_override_of_another_form_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'{text}'")):
        config.parse_override(text)


def test_an_override_in_another_encoding_is_refused() -> None:
    with pytest.raises(ConfigError):
        config.parse_override(os.fsdecode(b"title=\xff"))


def test_an_override_reaches_into_a_section_and_leaves_the_rest(tmp_path: Path) -> None:
    text = "outer: {inner: {width: 5}, depth: 7}\noptimizer: {kind: sgd}\n"
    built = load(tmp_path, text, "outer.inner.width=6", "optimizer.momentum=0.5")
    assert (built.outer.inner.width, built.outer.depth) == (6, 7)
    assert built.optimizer == Sgd(kind="sgd", momentum=0.5)


@pytest.mark.parametrize("override", ["training=3", "training.lr.x=3", "scales.0=1", "outer.inner=[1]"])
def test_an_override_of_the_wrong_depth_is_a_mistake_of_the_override(tmp_path: Path, override: str) -> None:
    (line,) = mistakes(tmp_path, "training: {lr: 0.5}\nscales: [1]\n", override)
    assert line.startswith(f"override '{override}': ")


# --- the way back -----------------------------------------------------------------------------------------------

VALUES: list[dict[str, Any]] = [
    {},
    {"title": "null", "scales": [1e-5, 1e300, 0.1 + 0.2, -0.0, 1e22, 123456789.123456789]},
    {"title": "1e-3", "flag": True, "notes": {"": 1, "a.b": 2, "yes": 3, "1": 4}},
    {"title": " leading: 'quotes' \"and\" # hash\nsecond line\ttab \\ é 日本 \U0001f600"},
    {"title": ""},
    {"title": "~"},
    {"title": "0o17"},
    {"title": "2020-01-01"},
    {"title": "- a"},
    {"title": "%YAML"},
    {"title": "\u2028\u200b\ufeff"},
    {"optimizer": {"kind": "adam", "beta": 0.25}, "outer": {"inner": {"names": ["no", "1", "*x", "&y", "!z"]}}},
]


@pytest.mark.parametrize("values", VALUES)
def test_settings_written_as_yaml_are_read_back_the_same(tmp_path: Path, values: dict[str, Any]) -> None:
    settings = Whole.model_validate(values)
    assert load(tmp_path, config.to_yaml(settings)) == settings


def test_written_yaml_is_complete_and_in_the_order_of_the_fields() -> None:
    values = config.parse_yaml(config.to_yaml(Whole()).encode(), "x").values
    assert list(values) == list(Whole.model_fields)
    assert list(values["training"]) == ["lr", "epochs", "workers"]


def test_flatten_names_settings_as_overrides_do(tmp_path: Path) -> None:
    settings = Whole.model_validate({"outer": {"inner": {"width": 5, "names": ["a"]}}, "notes": {"n": 1}})
    flat = config.flatten(settings)
    assert flat["outer.inner.width"] == 5
    assert flat["outer.inner.names"] == ["a"]
    assert flat["notes.n"] == 1
    assert flat["title"] is None
    overrides = [f"{name}={value}" for name, value in flat.items() if not isinstance(value, list) and value is not None]
    assert load(tmp_path, "outer: {inner: {names: [a]}}", *overrides) == settings


def test_settings_are_frozen_and_refuse_unknown_names() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Whole().flag = True  # type: ignore[misc]
    with pytest.raises(ValueError, match="extra"):
        Whole.model_validate({"unknown": 1})


def test_deep_but_reasonable_nesting_is_read() -> None:
    depth = 20
    value = config.parse_yaml(b"a: " + b"[" * depth + b"1" + b"]" * depth, "x").values["a"]
    for _ in range(depth):
        (value,) = value
    assert value == 1


@pytest.mark.parametrize(
    "overrides", [("optimizer.kind=adam", "optimizer.beta=0.5"), ("optimizer.beta=0.5", "optimizer.kind=adam")]
)
def test_another_kind_replaces_a_section_and_what_was_set_in_it(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert load(tmp_path, "optimizer: {kind: sgd, momentum: 0.5}", *overrides).optimizer == Adam(kind="adam", beta=0.5)
    write(tmp_path, base="optimizer: {kind: sgd, momentum: 0.5}", child="extends: base.yaml\noptimizer: {kind: adam}")
    layers = config.load_layers(tmp_path / "child.yaml")
    assert config.build(Whole, layers).optimizer == Adam(kind="adam")
    assert all("momentum" not in keys for keys in layers.places)


def test_the_same_kind_named_again_keeps_what_was_set(tmp_path: Path) -> None:
    found = load(tmp_path, "optimizer: {kind: sgd, momentum: 0.5}", "optimizer.kind=sgd")
    assert found.optimizer == Sgd(kind="sgd", momentum=0.5)


def test_a_setting_of_another_kind_is_not_guessed_to_be_itself(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "optimizer:\n  kind: adam\n  momentum: 0.5\n")
    assert line == "file.yaml:3:3: 'optimizer.momentum' is not a setting where the kind is 'adam'."


class Shelf(Settings):
    boxes: dict[str, Inner] = Field(description="by a free name")


def test_a_typo_below_a_free_name_is_pointed_out_there() -> None:
    with pytest.raises(ConfigError, match=re.escape("Did you mean 'boxes.red/1.width'?")):
        config.build(Shelf, config.parse_yaml(b"boxes: {red/1: {widht: 3}}", "shelf.yaml"))


def test_what_an_empty_file_lacks_is_said_of_that_file() -> None:
    with pytest.raises(ConfigError, match=r"^shelf\.yaml: 'boxes' is required\."):
        config.build(Shelf, config.parse_yaml(b"# nothing\n", "shelf.yaml"))


def test_of_very_many_names_the_nearest_and_the_first_are_listed() -> None:
    message = str(config.no_such("run", "trial-0999x", [f"trial-{number:04d}" for number in range(1000)]))
    assert "Did you mean 'trial-0999'?" in message and message.endswith("trial-0039, and 960 more.")
    assert str(config.no_such("study", "mine", [])) == "no study is called 'mine'; there is none."
