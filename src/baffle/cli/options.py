"""Command-line options made from the fields of ``TrainConfig``, which say their own type, default and help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import typer

from baffle.errors import OptionError
from baffle.training.options import TrainConfig

_FIELDS = {field.name: field for field in msgspec.structs.fields(TrainConfig)}


@dataclass(frozen=True)
class Flag:
    """An option of a command for one field of ``TrainConfig``, which says what is left out here.

    Attributes:
        field: Name of the field.
        panel: Heading in ``--help``.
        help: Help text.
        default: Default value that ``--help`` shows.
    """

    field: str
    panel: str | None = None
    help: str | None = None
    default: object = None


def with_flags(flags: Sequence[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options in place of its parameter ``flags``.

    The command gets a dict of the options the user has set, by field name. Options have no defaults of their own, so
    that values of a TOML file or of the command show through; ``--help`` prints the defaults nevertheless.

    Args:
        flags: The options, in the order in which ``--help`` lists them.

    Returns:
        A decorator of a command that has a parameter ``flags``.
    """
    options = [_parameter(flag) for flag in flags]
    names = {flag.field for flag in flags}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for each in own for p in (options if each.name == "flags" else [each])]

        @functools.wraps(command)
        def run(**arguments: object) -> None:
            chosen = {name: value for name, value in arguments.items() if name in names and value is not None}
            if "sigma" in chosen:
                chosen["sigma"] = _number_or_auto("sigma", str(chosen["sigma"]))
            others = {name: value for name, value in arguments.items() if name not in names}
            command(flags=chosen, **others)

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(flag: Flag) -> inspect.Parameter:
    field = _FIELDS[flag.field]
    kind, meta = field.type, msgspec.Meta()
    if get_origin(kind) is Annotated:
        kind, meta = get_args(kind)
    extra = meta.extra or {}
    usual = "no" if field.default is False else field.default
    default = next((d for d in (flag.default, extra.get("shown"), usual) if d is not None), None)
    info = _option(flag.help or meta.description or "", flag.panel or extra.get("group"), default)
    return inspect.Parameter(
        flag.field,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_on_the_command_line(kind) | None, info],
    )


def _option(help: str, panel: str | None, default: object) -> typer.models.OptionInfo:
    """An option that shows its default without having one."""
    shown = f"{help} [dim]\\[default: {default}][/dim]" if default is not None else help
    info: typer.models.OptionInfo = typer.Option(help=shown, rich_help_panel=panel, show_default=False)
    return info


def _on_the_command_line(kind: Any) -> Any:
    """The type a field's value has as typed: choices and "a number or a word" are text, checked later."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [k for k in get_args(kind) if k is not NoneType]
        return _on_the_command_line(kinds[0]) if len(kinds) == 1 else str
    return str if get_origin(kind) is Literal else kind


def _number_or_auto(field: str, text: str) -> float | str:
    """The value of an option that is a number or "auto"."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise OptionError(field, text, "a number > 0, or auto") from None
