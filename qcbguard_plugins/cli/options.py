"""Options that several verbs take."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from qcbguard_plugins.errors import UsageError

if TYPE_CHECKING:
    from qcbguard_plugins.backends.ggml.options import GgufOptions

_SIZE = TypeAdapter(ByteSize)
_OPTIONS = (
    click.option(
        "--llama-quantize",
        "quantize_path",
        type=click.Path(path_type=Path),
        help="The binary, asked for the type of every tensor; the one on the PATH by default.",
    ),
    click.option("--quantize-args", default="", help="Flags that you will give llama-quantize, in one string."),
    click.option("--imatrix", "imatrix_path", type=click.Path(path_type=Path), help="Importance matrix, a GGUF file."),
    click.option(
        "--ggml-library",
        "library_path",
        type=click.Path(path_type=Path),
        help="libggml-base of a llama.cpp build; that of an installed package by default.",
    ),
    click.option(
        "--min-as-planned",
        type=float,
        default=0.98,
        show_default=True,
        help="Share of a tensor's codes that must be stored as chosen.",
    ),
)


def guard_options(method: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of every verb that guards: the method with its parameters, the seed, and what is left out.

    Args:
        method: The default method.
        help: What to say of ``--method``.
    """
    options = (
        click.option("--method", default=method, show_default=True, help=help),
        click.option("--set", "parameters", multiple=True, help="Parameter of the method, as in --set sigma=0.2."),
        click.option("--seed", type=click.IntRange(min=0), help="Seed; a fresh one by default, recorded either way."),
        click.option(
            "--ignore", multiple=True, help="Leave these tensors unguarded: a glob, or re:REGEX. The run exits 3."
        ),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class Bytes(click.ParamType[int]):
    """A size with its unit, such as ``6GiB``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(_SIZE.validate_python(value))
        except ValidationError:
            self.fail(f"{value!r} is not a size such as 6GiB, 512MiB or 8GB", param, ctx)


max_memory_option = click.option(
    "--max-memory",
    "budget_bytes",
    type=Bytes(),
    metavar="SIZE",
    help="What a process may hold in memory, such as 6GiB; by default what the machine has left.",
)


def gguf_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every verb that guards for llama.cpp."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_gguf_options(values: dict[str, Any]) -> GgufOptions:
    """The options that :func:`gguf_options` adds, checked."""
    from qcbguard_plugins.backends.ggml.options import GgufOptions

    return GgufOptions(**(values | {"quantize_args": tuple(shlex.split(values["quantize_args"]))}))


def parse_parameters(parameters: tuple[str, ...]) -> dict[str, Any]:
    """``name=value`` pairs, the values as JSON or bare words."""
    parsed: dict[str, Any] = {}
    for parameter in parameters:
        name, separator, value = parameter.partition("=")
        if not separator or not name or not value:
            raise UsageError(f"--set {parameter!r} is not name=value", remedy="For example: --set width=0.25")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value  # a bare word, as in width=auto; the method refuses what it does not know
    return parsed
