"""Flags and YAML keys from the fields of a dataclass, so that each option is written once.

A field's type, default and help (``metadata["help"]``) become a flag, ``learning_rate`` being
``--learning-rate``, and a key of a configuration file, under its own name.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

import typer

from ladder_kernels.errors import ConfigError, MissingFileError

__all__ = ["flags_of", "given", "make", "read_config", "with_flags"]

_SCALARS: dict[type, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


def flags_of(
    record: type, *, names: Mapping[str, str] | None = None, panels: Mapping[str, str] | None = None
) -> list[inspect.Parameter]:
    """One keyword parameter with a typer option for each field of a dataclass.

    Fields without a default are optional flags here, because a file may hold them; :func:`make`
    asks for them.

    Args:
        record: A dataclass.
        names: Flags that are not called as their field is: field name -> parameter name.
        panels: Headings in the help: first field below one -> heading.

    Returns:
        Parameters for :func:`with_flags`, in the fields' order.
    """
    from rich.markup import escape

    parameters, panel = [], None
    for field in dataclasses.fields(record):
        panel = (panels or {}).get(field.name, panel)
        required = field.default is dataclasses.MISSING
        kind, _ = _type_of(record, field.name)
        name = (names or {}).get(field.name, field.name)
        text = field.metadata["help"] + (" (required)" if required else "")
        flag = "--" + name.replace("_", "-")
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=escape(text),
            rich_help_panel=panel,
            metavar=None if kind in _SCALARS else "LIST",
        )
        annotation = kind if kind in _SCALARS else str
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if required else field.default,
                annotation=Annotated[annotation | None, option],
            )
        )
    return parameters


def with_flags(parameters: Iterable[inspect.Parameter]) -> Callable[[Callable], Callable]:
    """Give a command that takes ``**flags`` these parameters in their place.

    Args:
        parameters: From :func:`flags_of`.
    """

    def decorate(command: Callable) -> Callable:
        # Annotations are text while `from __future__ import annotations` holds; typer evaluates
        # them itself only when it reads the signature from the function.
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        command.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
        return command

    return decorate


def given(context: typer.Context, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``flags`` that stand on the command line, by name."""
    sources = {name: context.get_parameter_source(name) for name in flags}
    return {
        name: flags[name]
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }


def make(
    record: type,
    values: Mapping[str, Any],
    *,
    where: str = "",
    names: Mapping[str, str] | None = None,
) -> Any:
    """Make a dataclass of values from flags and files.

    Args:
        record: The dataclass.
        values: By field name; scalars, or for other fields YAML text or what YAML reads of it.
        where: Where a missing field may stand besides on the command line.
        names: As in :func:`flags_of`.

    Raises:
        ConfigError: If a value is missing or has the wrong type.
    """
    missing = [
        "--" + (names or {}).get(field.name, field.name).replace("_", "-")
        for field in dataclasses.fields(record)
        if field.default is dataclasses.MISSING and values.get(field.name) in (None, "")
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given{where}")
    return record(**{name: _convert(record, name, value) for name, value in values.items()})


def read_config(path: Path, record: type) -> dict[str, Any]:
    """Read options from a YAML file.

    Args:
        path: The file: a mapping whose keys are field names of ``record``.
        record: The dataclass.

    Returns:
        Checked values by field name.

    Raises:
        MissingFileError: If there is no such file.
        ConfigError: If it is not valid YAML or not a mapping, or holds an unknown key, one key
            twice, or a value of the wrong type.
    """
    content = _load_yaml(_text_of(path), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: found {_shown(content)}; it must map option names to values, such as "
            "'context: 2048'"
        )
    allowed = [field.name for field in dataclasses.fields(record)]
    for key in content:
        if key not in allowed:
            raise ConfigError(f"{path}: unknown key {key!r}; {_nearest(str(key), allowed)}")
    try:
        return {key: _convert(record, key, value) for key, value in content.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _nearest(key: str, allowed: Collection[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_").lower(), allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"


def _text_of(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFileError(f"'{path}' does not exist; --config names a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 ({error.reason})") from None


def _load_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; the loader of PyYAML, but a key may not stand in a mapping twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"{where}: the key {key!r} stands in it twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML{at}: {problem}") from None


def _type_of(record: type, name: str) -> tuple[Any, bool]:
    """A field's type without ``None``, and whether ``None`` is allowed."""
    hint = typing.get_type_hints(record)[name]
    kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType]
    optional = NoneType in typing.get_args(hint)
    return (kinds[0], True) if optional else (hint, False)


def _convert(record: type, name: str, value: Any) -> Any:
    """A value as its field's type.

    Numbers may be text: YAML reads ``1e-3`` as text, for want of a dot.
    """
    kind, optional = _type_of(record, name)
    if value is None and optional:
        return None
    if kind not in _SCALARS:
        return _frozen(_load_yaml(value, name) if isinstance(value, str) else value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if (
        kind in (int, float)
        and isinstance(value, (str, int, float))
        and not isinstance(value, bool)
    ):
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is not None and kind is float:
            return number
        if number is not None and number.is_integer():
            return int(number)
    hint = "; put it in quotes" if kind is str and isinstance(value, (bool, int, float)) else ""
    raise ConfigError(f"{name}: found {_shown(value)}; it must be {_SCALARS[kind]}{hint}")


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else repr(value)
