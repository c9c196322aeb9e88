"""Flags and YAML keys from a record's fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import typer

from ladder_kernels.cli.app import app
from ladder_kernels.cli.loading import ModelOptions
from ladder_kernels.cli.options import flags_of, make, read_config
from ladder_kernels.cli.train import PANELS
from ladder_kernels.errors import ConfigError
from ladder_kernels.training.options import DataOptions, TrainOptions


def _option(default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": "some [text]"})


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str = _option()
    count: int = _option(3)
    rate: float | None = _option(None)
    fast: bool = _option(True)
    exact: bool | None = _option(None)
    rungs: tuple[tuple[int, ...], ...] | None = _option(None)


def test_every_field_is_a_flag_of_its_command():
    commands = typer.main.get_command(app).commands
    for command, record, renamed in (
        ("train", TrainOptions, {}),
        ("generate", ModelOptions, {}),
        ("evaluate", ModelOptions, {}),
        ("evaluate", DataOptions, {"source": "data"}),
    ):
        flags = {parameter.name: parameter for parameter in commands[command].params}
        for one in dataclasses.fields(record):
            flag = flags[renamed.get(one.name, one.name)]
            assert f"--{flag.name.replace('_', '-')}" in flag.opts
            assert flag.default == (None if one.default is dataclasses.MISSING else one.default)


def test_headings_of_the_help_start_at_fields():
    assert set(PANELS) <= {one.name for one in dataclasses.fields(TrainOptions)}


def test_required_fields_may_come_from_elsewhere():
    flags = {parameter.name: parameter for parameter in flags_of(Record)}
    assert flags["name"].default is None
    assert flags["count"].default == 3
    assert list(flags) == [one.name for one in dataclasses.fields(Record)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("# only a comment\n", {}),
        ("rate: 1e-3", {"rate": 1e-3}),  # text to YAML, which wants a dot
        ("rate: 2", {"rate": 2.0}),
        ("count: 1e3", {"count": 1000}),
        ("count: 2.0", {"count": 2}),
        ("fast: no", {"fast": False}),
        ("exact: true", {"exact": True}),
        ("rate: null\nexact: ~", {"rate": None, "exact": None}),
        ("name: none", {"name": "none"}),
        ("rungs: [[1], [2, 3], []]", {"rungs": ((1,), (2, 3), ())}),
        ("rungs: '[[1], []]'", {"rungs": ((1,), ())}),
    ],
)
def test_a_file(tmp_path, text, values):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    read = read_config(path, Record)
    assert read == values
    assert {name: type(value) for name, value in read.items()} == {
        name: type(value) for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": True}, "name: found true; it must be text; put it in quotes"),
        ({"name": 7}, "name: found 7; it must be text; put it in quotes"),
        ({"name": ["a"]}, r"name: found \['a'\]; it must be text"),
        ({"count": True}, "count: found true; it must be a whole number"),
        ({"count": "inf"}, "count: found 'inf'"),
        ({"rate": "quick"}, "rate: found 'quick'; it must be a number"),
        ({"fast": "yes"}, "fast: found 'yes'; it must be true or false"),
        ({"fast": None}, "fast: found nothing; it must be true or false"),
        ({"rungs": "[[1"}, "rungs: not valid YAML"),
    ],
)
def test_values_of_the_wrong_type(values, message):
    with pytest.raises(ConfigError, match=message):
        make(Record, {"name": "a", **values})


@pytest.mark.parametrize("values", [{"count": 1}, {"name": ""}, {"name": None}])
def test_missing_values_are_named_as_flags(values):
    with pytest.raises(ConfigError, match=r"^--title must be given, as a flag$"):
        make(Record, values, where=", as a flag", names={"name": "title"})
