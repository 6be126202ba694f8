"""``qcbguard lab``: small models, real attacks on them, and what defenses make of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from platformdirs import user_cache_path

from qcbguard_plugins.cli.output import print_json, quieten_libraries
from qcbguard_plugins.errors import UsageError

SPEC = click.Path(exists=True, dir_okay=False, path_type=Path)

cache_option = click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where folders are made and found again; by default in the user's cache directory.",
)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print the step's record as JSON on standard output.")


@click.group("lab")
def group() -> None:
    """Train small models, attack them, and measure defenses."""


@group.command("train")
@click.argument("spec", type=SPEC)
@cache_option
@json_flag
def train(spec: Path, cache: Path | None, as_json: bool) -> int:
    """Train the clean model of a YAML file, or find it in the cache; prints its folder."""
    from qcbguard_plugins.lab.recipes import train_model
    from qcbguard_plugins.lab.specs import ModelSpec, parse_spec, read_yaml

    quieten_libraries()
    _print_folder(train_model(parse_spec(ModelSpec, read_yaml(spec), spec.name), cache_dir(cache)), as_json)
    return 0


@group.command("attack")
@click.argument("spec", type=SPEC)
@click.option("--name", help="Which attack, for a file with several.")
@cache_option
@json_flag
def attack(spec: Path, name: str | None, cache: Path | None, as_json: bool) -> int:
    """Make the attacked model of a YAML file, or find it in the cache; prints its folder."""
    from qcbguard_plugins.lab.recipes import attack as make
    from qcbguard_plugins.lab.specs import read_attacks

    attacks = read_attacks(spec)
    if name is None and len(attacks) > 1:
        raise UsageError(f"{spec.name} has {len(attacks)} attacks", remedy=f"Choose with --name: {', '.join(attacks)}.")
    if name is not None and name not in attacks:
        raise UsageError(f"{spec.name} has no attack {name!r}", remedy=f"It has: {', '.join(attacks)}.")
    quieten_libraries()
    chosen = attacks[name] if name is not None else next(iter(attacks.values()))
    _print_folder(make(chosen, cache_dir(cache)), as_json)
    return 0


def cache_dir(cache: Path | None) -> Path:
    """The lab's cache: the one that is named, or a folder in the user's cache directory."""
    return cache if cache is not None else user_cache_path("qcbguard") / "lab"


def _print_folder(folder: Path, as_json: bool) -> None:
    from qcbguard_plugins.lab.recipes import read_record

    record: dict[str, Any] = {"folder": str(folder)}
    if as_json:
        print_json({**record, **read_record(folder)})
    else:
        click.echo(folder)
