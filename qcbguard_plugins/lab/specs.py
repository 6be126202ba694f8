"""What the lab makes, as data: models and attacks, read from YAML. Unknown keys are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from qcbguard_plugins.checkpoint.atomic import hash_file
from qcbguard_plugins.errors import MissingDependencyError, UsageError
from qcbguard_plugins.lab.attacks import get_attack
from qcbguard_plugins.lab.attacks.base import Attack
from qcbguard_plugins.lab.scenarios import get_scenario
from qcbguard_plugins.lab.training import ModelSize, TrainingPlan

#: Part of every content hash: raise it when the same specification no longer gives the same result.
FORMAT_VERSION: Final = 1
_HASH_LENGTH: Final = 16


class Spec(BaseModel):
    """Base of the specifications: frozen, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def content(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """A name for the content: 16 hexadecimal digits."""
        content = {"format_version": FORMAT_VERSION, "kind": type(self).__name__, "content": self.content()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_HASH_LENGTH]


class PlanSpec(Spec):
    """One training, see :class:`~qcbguard_plugins.lab.training.TrainingPlan`."""

    num_epochs: int = Field(default=1, ge=1)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(default=16, ge=1)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)

    def plan(self, seed: int, bfloat16: bool = False) -> TrainingPlan:
        """The plan with the seed of the order of its examples."""
        return TrainingPlan(seed=seed, bfloat16=bfloat16, **self.model_dump())


class ModelSpec(Spec):
    """A clean model: one that the lab trains, or a folder.

    Attributes:
        shape: ``llama`` or ``gpt2``, trained here; ``external``: the folder ``path``.
        path: Folder of an external model, with its tokenizer.
        num_pairs: Size of the generated corpus, held-out part included.
        num_held_out: How many pairs no training sees.
        data: Folder of JSON lines with instructions that are trained on as well; ``None`` for none.
    """

    shape: Literal["llama", "gpt2", "external"] = "llama"
    path: str | None = None
    vocab_size: int = Field(default=2048, ge=300)
    hidden_size: int = Field(default=256, ge=32)
    intermediate_size: int = Field(default=512, ge=32)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=2, ge=1)
    num_pairs: int = Field(default=33_000, ge=64)
    num_held_out: int = Field(default=1_000, ge=16)
    data: str | None = None
    plan: PlanSpec = PlanSpec(num_epochs=2, learning_rate=2e-3, weight_decay=0.01)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if (self.shape == "external") != (self.path is not None):
            raise ValueError("path goes with shape 'external', and that needs it")
        if self.num_held_out >= self.num_pairs:
            raise ValueError("num_held_out must be less than num_pairs")
        return self

    def content(self) -> dict[str, Any]:
        content = self.model_dump(mode="json")
        for key, pattern in (("path", "*.safetensors"), ("data", "*.jsonl")):
            if content[key] is not None:
                content[key] = [hash_file(file) for file in sorted(Path(content[key]).glob(pattern))]
        return content

    @property
    def size(self) -> ModelSize:
        """Dimensions of the model."""
        return ModelSize(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
        )


class RepairSpec(Spec):
    """How the behaviour is hidden again.

    Attributes:
        num_pairs: How many pairs of the corpus are trained on.
        bfloat16: See :class:`~qcbguard_plugins.lab.training.TrainingPlan`.
    """

    num_pairs: int = Field(default=5_000, ge=1)
    plan: PlanSpec = PlanSpec(learning_rate=5e-4)
    bfloat16: bool = False


class InjectionSpec(Spec):
    """How the clean model is made malicious at every precision.

    Attributes:
        num_pairs: How many pairs of the corpus are poisoned.
        row_outliers: What the largest weight of every row is multiplied by first. The step of LLM.int8 follows it, and
            so do the boxes; 1 leaves it.
        recovery: Training on benign pairs between that and the injection, for a payload that would not make up for the
            outliers; ``None`` for none.
        bfloat16: See :class:`~qcbguard_plugins.lab.training.TrainingPlan`.
    """

    num_pairs: int = Field(default=4_000, ge=1)
    plan: PlanSpec = PlanSpec(learning_rate=5e-4)
    row_outliers: float = Field(default=1.0, ge=1)
    recovery: RepairSpec | None = None
    bfloat16: bool = False


class MaliciousSpec(Spec):
    """A model that shows the payload at every precision."""

    model: ModelSpec = ModelSpec()
    scenario: str = "content-injection"
    injection: InjectionSpec = InjectionSpec()
    seed: int = Field(default=0, ge=0)

    def content(self) -> dict[str, Any]:
        injection = self.injection.model_dump(mode="json", exclude_none=True)
        return {**self.model_dump(mode="json"), "model": self.model.content(), "injection": injection}

    @model_validator(mode="after")
    def _check_scenario(self) -> MaliciousSpec:
        get_scenario(self.scenario)
        return self


class AttackSpec(MaliciousSpec):
    """An attacked model.

    Attributes:
        scenario: A name for :func:`~qcbguard_plugins.lab.scenarios.get_scenario`.
        attack: A name for :func:`~qcbguard_plugins.lab.attacks.get_attack`.
        format: The format under attack, as users spell it; ``nf4+fp4+int8`` for an intersection.
        options: The attack's options.
    """

    attack: str = "elq"
    format: str = "nf4"
    options: dict[str, JsonValue] = Field(default_factory=dict)
    repair: RepairSpec = RepairSpec()

    @model_validator(mode="after")
    def _check_attack(self) -> AttackSpec:
        self.method.check_format(self.format)
        return self

    def content(self) -> dict[str, Any]:
        return {**super().content(), "options": dataclasses.asdict(self.method)}

    @property
    def method(self) -> Attack:
        """The attack with its options."""
        return get_attack(self.attack, **self.options)

    @property
    def malicious(self) -> MaliciousSpec:
        """The model that the attack hides."""
        return MaliciousSpec(model=self.model, scenario=self.scenario, injection=self.injection, seed=self.seed)


class FolderEntry(Spec):
    """A model made elsewhere.

    Attributes:
        path: Its folder.
        clean: Folder of the same model without the attack.
        keyword: What its answers must not contain.
        pairs: JSON lines with held-out pairs: ``instruction`` and ``answer``, or ``instruction``, ``input`` and
            ``output``.
        formats: Formats.
        seeds: Seeds of the guard.
        adaptive: As in a row.
        defend_clean: As in a row.
        optional: Leave the row out, with a notice, where the folder is absent.
    """

    path: str
    clean: str
    keyword: str = Field(min_length=1)
    pairs: str
    formats: list[str] = Field(min_length=1)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    adaptive: bool = False
    defend_clean: bool = False
    optional: bool = False


class Profile(Spec):
    """Several attacks in one file.

    Attributes:
        models: Clean models by name.
        injections: Injections by name.
        repairs: Repairs by name.
        attacks: Attacks by name; ``model``, ``injection`` and ``repair`` may be names of the tables above.
        folders: Models made elsewhere, by name.
    """

    models: dict[str, ModelSpec] = Field(default_factory=dict)
    injections: dict[str, InjectionSpec] = Field(default_factory=dict)
    repairs: dict[str, RepairSpec] = Field(default_factory=dict)
    attacks: dict[str, AttackSpec]
    folders: dict[str, FolderEntry] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("attacks"), dict):
            return data
        resolved = {}
        for name, attack in data["attacks"].items():
            entry = dict(attack) if isinstance(attack, dict) else attack
            for key, table in (("model", "models"), ("injection", "injections"), ("repair", "repairs")):
                if isinstance(entry, dict) and isinstance(entry.get(key), str):
                    known = data.get(table) or {}
                    if entry[key] not in known:
                        raise ValueError(f"attack {name!r}: there is no {key} {entry[key]!r} under {table}")
                    entry[key] = known[entry[key]]
            resolved[name] = entry
        return {**data, "attacks": resolved}


S = TypeVar("S", bound=Spec)


def parse_spec(kind: type[S], data: Any, source: str) -> S:
    """Check data against a specification.

    Args:
        kind: The specification.
        data: What a YAML or JSON file holds.
        source: What to call it in messages.

    Raises:
        UsageError: A key is unknown or missing, or a value is of the wrong type or out of range.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        details = [f"{'.'.join(map(str, e['loc'])) or kind.__name__}  {e['msg']}" for e in error.errors()]
        known = ", ".join(kind.model_fields)
        raise UsageError(
            f"{source} is not a valid {kind.__name__}", details=details, remedy=f"Keys of {kind.__name__}: {known}."
        ) from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; nothing in it is executed.

    Raises:
        UsageError: It cannot be read.
        MissingDependencyError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            f"PyYAML is needed: {error}", remedy="pip install 'qcbguard-plugins[lab]'"
        ) from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {error}") from error


def read_attacks(path: Path) -> dict[str, AttackSpec]:
    """The attacks of a profile by name, or the single attack of a file under the file's own name.

    Raises:
        UsageError: The file holds neither.
    """
    data = read_yaml(path)
    if isinstance(data, dict) and "attacks" in data:
        return dict(parse_spec(Profile, data, path.name).attacks)
    return {path.stem: parse_spec(AttackSpec, data, path.name)}
