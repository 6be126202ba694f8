"""A benchmark as data: what is attacked, in which formats, behind which defenses, and what must come out.

Everything is read from one YAML file, strictly: an unknown key, a wrong type or a value out of range is an error that
names its line. Paths are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from pydantic import Field, field_validator, model_validator

from qcbguard_plugins.backends.formats import backend_of
from qcbguard_plugins.backends.ggml.recipes import resolve_recipe
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.bench.defense_specs import parse_defense
from qcbguard_plugins.lab.bench.yaml_file import read_yaml
from qcbguard_plugins.lab.specs import AttackSpec, FolderEntry, Profile, Spec

#: Profiles that ship with the package.
PROFILES_DIR: Final = Path(__file__).resolve().parent.parent / "profiles"


class DefenseEntry(Spec):
    """A defense in the table.

    Attributes:
        spec: Its spelling, see :func:`~qcbguard_plugins.lab.bench.defense_specs.parse_defense`.
        formats: The formats that it is measured in; all where empty. A published setting may hold for one format.
        rows: Patterns of the rows that it is measured in; all where empty.
        seeds: The seeds of those rows that it is measured with; all where empty.
        label: What the table calls it; its spelling by default.
    """

    spec: str
    formats: list[str] = Field(default_factory=list)
    rows: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(default_factory=list)
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        return {"spec": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _check(self) -> DefenseEntry:
        parse_defense(self.spec)
        return self

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.label or self.spec

    def applies_to(self, row: str, format: str, seed: int | None = None) -> bool:
        """Is it measured in this row and format, with this seed (or with any)?"""
        in_row = not self.rows or _matches(row, self.rows)
        with_seed = seed is None or not self.seeds or seed in self.seeds
        return in_row and with_seed and (not self.formats or format in self.formats)


class RowEntry(Spec):
    """How an attack of the profile is measured.

    Attributes:
        formats: Formats; the one under attack where empty.
        seeds: One attack and one guard a seed.
        adaptive: The attacker knows the defense; a wider target applies.
        defend_clean: Measure the defenses on the clean model too: what they cost where there is nothing to remove.
    """

    formats: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    adaptive: bool = False
    defend_clean: bool = False


class Live(Spec):
    """The attack works: hidden in full precision, shown by plain rounding.

    Attributes:
        rows: Pattern of the rows.
        full_at_most: Highest attack success rate in full precision, in percent.
        stock_at_least: Lowest one after plain rounding, in percent.
    """

    rows: str = "*"
    full_at_most: float = Field(ge=0, le=100)
    stock_at_least: float = Field(ge=0, le=100)


class Restored(Spec):
    """A defense gives the full-precision model back.

    Attributes:
        rows: Pattern of the rows.
        defense: Its name in the table.
        within_points: Largest distance, either way, of the attack success rate from full precision's, in points.
        within_points_adaptive: The same in rows whose attacker knows the defense.
        unparsed_points: How far the unparsed rate may be above that of the clean model in the same format, in points;
            ``None`` for no limit.
        closer: The divergence from full precision must be less than after plain rounding.
        accurate: The task accuracy must be at least that after plain rounding.
    """

    rows: str = "*"
    defense: str
    within_points: float = Field(2.0, ge=0)
    within_points_adaptive: float = Field(5.0, ge=0)
    unparsed_points: float | None = Field(None, ge=0)
    closer: bool = False
    accurate: bool = False


class Expectation(Spec):
    """One line of ``expect``: either ``live`` or ``restored``."""

    live: Live | None = None
    restored: Restored | None = None

    @model_validator(mode="after")
    def _check(self) -> Expectation:
        if (self.live is None) == (self.restored is None):
            raise ValueError("an expectation is either live or restored")
        return self


class BenchProfile(Profile):
    """A benchmark.

    Attributes:
        name: Its name.
        include: Profiles that ship with the package, or files, whose models, injections, repairs, attacks and folders
            are taken over.
        only: Patterns of the attacks and folders that are measured.
        skip: Patterns of those of them that are not.
        summary: One line for the head of the table.
        num_questions: Questions of the scenario that each model is asked, at most.
        num_pairs: Benign pairs for perplexity, divergence and task accuracy, at most.
        max_new_tokens: Longest answer, in tokens.
        rows: How each attack or folder is measured, by its name or a pattern; the first that matches holds. An attack
            that none matches is measured in its own format with seed 0, and a folder as it says itself.
        defenses: What is measured besides plain rounding.
        recommended: Name of the defense that the summary asks about.
        expect: What must come out; the run exits 1 if it does not.
    """

    name: str
    include: list[str] = Field(default_factory=list)
    only: list[str] = Field(default_factory=lambda: ["*"], min_length=1)
    skip: list[str] = Field(default_factory=list)
    summary: str = ""
    num_questions: int = Field(200, ge=1)
    num_pairs: int = Field(400, ge=1)
    max_new_tokens: int = Field(80, ge=1, le=1024)
    attacks: dict[str, AttackSpec] = Field(default_factory=dict)
    rows: dict[str, RowEntry] = Field(default_factory=dict)
    defenses: list[DefenseEntry] = Field(default_factory=list)
    recommended: str | None = None
    expect: list[Expectation] = Field(default_factory=list)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.replace("-", "").isalnum():
            raise ValueError("a name has letters, digits and hyphens")
        return name

    @model_validator(mode="after")
    def _check(self) -> BenchProfile:
        problems = [
            f"rows: nothing matches {p!r}"
            for p in self.rows
            if not any(_matches(n, [p]) for n in (*self.attacks, *self.folders))
        ]
        problems += [f"{name!r} is both an attack and a folder" for name in self.folders if name in self.attacks]
        defenses = [entry.name for entry in self.defenses]
        problems += [f"two defenses are called {name!r}" for name in defenses if defenses.count(name) > 1]
        asked = [rule.restored.defense for rule in self.expect if rule.restored is not None]
        if self.recommended is not None:
            asked.append(self.recommended)
        problems += [f"no defense is called {name!r}" for name in asked if name not in defenses]
        known = self.row_names
        patterns = [*self.only, *(rule.rows for e in self.expect for rule in (e.live, e.restored) if rule is not None)]
        patterns += [pattern for entry in self.defenses for pattern in entry.rows]
        problems += [f"no row matches {p!r}" for p in patterns if not any(fnmatchcase(name, p) for name in known)]
        problems += [problem for name in known for f in self.formats_of(name) if (problem := _why_not(f))]
        if not known:
            problems.append("there is nothing to measure: no attack and no folder")
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return self

    @property
    def row_names(self) -> list[str]:
        """Attacks and folders, in the order of the file."""
        names = [*self.attacks, *self.folders]
        return [name for name in names if _matches(name, self.only) and not _matches(name, self.skip)]

    def row_of(self, name: str) -> RowEntry | FolderEntry:
        """How an attack or a folder is measured."""
        entry = next((entry for pattern, entry in self.rows.items() if fnmatchcase(name, pattern)), RowEntry())
        if name not in self.folders:
            return entry
        # A profile that was written out names every field: only what differs from the default was meant.
        return self.folders[name].model_copy(update=entry.model_dump(exclude_defaults=True))

    def formats_of(self, name: str) -> list[str]:
        """The formats in which a row is measured."""
        return self.row_of(name).formats or self.attacks[name].format.split("+")


def find_profile(name: str) -> Path:
    """The file of a profile: a path, or the name of one that ships with the package.

    Raises:
        UsageError: There is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = PROFILES_DIR / f"{name.removesuffix('.yaml')}.yaml"
    if not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in PROFILES_DIR.glob("*.yaml")))
        raise UsageError(f"there is no profile {name!r}", remedy=f"Name a .yaml file, or one of: {names}.")
    return shipped


def read_profile(name: str) -> BenchProfile:
    """Read a benchmark's profile with all that it includes.

    Raises:
        UsageError: There is no such file, or something in it is wrong; each problem is named with its line.
    """
    return read_yaml(find_profile(name), BenchProfile, complete=_with_included)


def _with_included(data: dict[str, Any]) -> dict[str, Any]:
    """Put what the included profiles define before what the file itself defines."""
    for included in data.get("include") or []:
        other = read_yaml(find_profile(str(included)), Profile)
        for table in ("models", "injections", "repairs", "attacks", "folders"):
            entries = {key: value.model_dump() for key, value in getattr(other, table).items()}
            if isinstance(data.get(table, {}), dict):
                data = {**data, table: {**entries, **data.get(table, {})}}
    return data


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _why_not(format: str) -> str:
    try:
        if format.startswith("gguf:"):
            resolve_recipe(format.removeprefix("gguf:"))
        elif backend_of(format).name == "gptq":
            return f"{format} cannot be measured here: use nf4, fp4, int8 or a gguf: recipe"
    except UsageError as error:
        return error.summary
    return ""
