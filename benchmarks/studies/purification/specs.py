"""What the lab purifies, as data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qcbguard_plugins.lab.specs import AttackSpec, MaliciousSpec, ModelSpec, Spec
from qcbguard_plugins.models.prompts import PLAIN_TEMPLATE
from qcbguard_plugins.purification.config import PurifyConfig

Method = Literal[
    "none",
    "purify",
    "random-channels",
    "matched-channels",
    "fine-tuning",
    "magnitude-pruning",
    "fine-pruning",
    "crow",
]

#: Settings of :class:`~qcbguard_plugins.purification.config.PurifyConfig` that decide a variant.
_OF_VARIANTS = (
    "num_variants",
    "num_samples",
    "variant_epochs",
    "variant_learning_rate",
    "batch_size",
    "bfloat16",
    "seed",
)


class LabSettings(Spec):
    """Hyperparameters for a model of the lab, which is a thousandth of the paper's and takes larger steps.

    Attributes:
        num_clean: Pairs at the end of the corpus that the defender has.
    """

    num_variants: int = Field(default=2, ge=1)
    num_samples: int = Field(default=300, ge=1)
    variant_epochs: int = Field(default=1, ge=1)
    variant_learning_rate: float = Field(default=5e-4, gt=0)
    ratio: float = Field(default=0.05, ge=0, le=1)
    score: Literal["combined", "norm", "alignment", "activation"] = "activation"
    alignment_weight: float = Field(default=0.01, ge=0)
    suppression: Literal["reinitialize", "zero"] = "reinitialize"
    num_healing: int = Field(default=4_000, ge=1)
    healing_keys: float = Field(default=0.0, ge=0, le=1)
    healing_search: float = Field(default=0.0, ge=0)
    healing_consistency: float = Field(default=0.0, ge=0)
    healing_epochs: int = Field(default=1, ge=1)
    healing_learning_rate: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)
    bfloat16: bool = True
    seed: int = Field(default=0, ge=0)
    num_clean: int = Field(default=4_000, ge=1)

    @property
    def config(self) -> PurifyConfig:
        """The hyperparameters, with the lab's prompt."""
        values = self.model_dump(exclude={"num_clean"})
        return PurifyConfig(**values, prompt_template=PLAIN_TEMPLATE)


class AdapterSpec(Spec):
    """A clean model under an adapter that carries the backdoor.

    Attributes:
        scenario: As in :class:`~qcbguard_plugins.lab.specs.MaliciousSpec`.
        num_pairs: How many pairs of the corpus are poisoned.
        rank: Of the adapter, on every linear layer.
    """

    model: ModelSpec = ModelSpec()
    scenario: str
    num_pairs: int = Field(default=1_500, ge=1)
    rank: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    num_epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)

    def content(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "model": self.model.content()}


#: What is suspicious: a whole model, or an adapter.
Attacked = AttackSpec | MaliciousSpec | AdapterSpec


class VariantsSpec(Spec):
    """The variants of one attacked model."""

    attacked: Attacked
    settings: LabSettings = LabSettings()

    def content(self) -> dict[str, Any]:
        settings = self.settings.model_dump(mode="json", include={*_OF_VARIANTS, "num_clean"})
        return {"attacked": self.attacked.content(), "settings": settings, "responses": True}


class PurifiedSpec(Spec):
    """An attacked model behind one method.

    Attributes:
        method: The method; ``random-channels`` suppresses as many channels as ``purify``, drawn by lot, and
            ``matched-channels`` as many in each block.
        pruned: Share of the weights that a pruning method clears.
        learning_rate: Of the training; the healing's where ``None``.
        variants: Numbers of the variants to use; all where ``None``.
        signature_of: Take the signature of another attacked model.
    """

    attacked: Attacked
    settings: LabSettings = LabSettings()
    method: Method = "purify"
    pruned: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float | None = Field(default=None, gt=0)
    variants: list[int] | None = None
    signature_of: MaliciousSpec | None = None

    @property
    def has_variants(self) -> bool:
        """Does the method look at the variants?"""
        return self.method in ("purify", "matched-channels")

    @property
    def variants_spec(self) -> VariantsSpec:
        """The variants whose signature is used."""
        return VariantsSpec(attacked=self.signature_of or self.attacked, settings=self.settings)

    def content(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude={"attacked", "signature_of"})
        other = None if self.signature_of is None else self.signature_of.content()
        return {**content, "attacked": self.attacked.content(), "signature_of": other}
