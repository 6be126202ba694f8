"""All hyperparameters of a purification in one place, and the presets that they start from.

``searched-keys``, the default, is what was measured best: no suppression, and a healing whose keys are moved against
the model. ``paper`` is the immunization as it was published.

References:
    Purifying Generative LLMs from Backdoors without Prior Knowledge or Clean Reference, arXiv 2603.13461 (ICLR 2026).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.purification.consistency import PUBLISHED_WEIGHT

#: Above this many parameters the paper's values for 13B are the nearer ones, below it those for 7B.
_LARGE: Final = 10_000_000_000
#: Below this many parameters the healing of the models of 2.9M that searched keys were measured on is the nearer one,
#: above it the paper's for 7B: the geometric mean of the two.
_SMALL: Final = 142_000_000
#: How much the paper heals.
_PAPER_HEALING: Final[dict[str, Any]] = {
    "num_healing": 200,
    "healing_epochs": 5,
    "healing_learning_rate": 1e-5,
    "batch_size": 8,
}


class PurifyConfig(BaseModel):
    """Hyperparameters of a purification.

    Attributes:
        num_variants: N, how many synthetic backdoored variants are trained.
        num_samples: Clean samples in each variant's own set. The poisoned half of its training has as many.
        variant_epochs: Passes over them.
        variant_learning_rate: Peak of their cosine schedule.
        score: ``combined`` (the paper's), ``norm`` or ``alignment`` alone; ``activation`` (ours): how strongly a unit
            responds to the variants' keys.
        alignment_weight: The weight of the alignment term of the combined score, lambda.
        ratio: Share of the MLP channels (of the adapter's rank components) in the signature, tau.
        num_heads: Attention heads in the signature.
        suppression: ``reinitialize`` draws full-model units anew; ``zero`` clears them. An adapter's are always
            cleared.
        lora_matrix: The matrix of an adapter that is cleared: columns of ``B``, as in a fresh adapter, or rows of
            ``A``.
        num_healing: Clean samples of the healing.
        healing_keys: Share of them that carry a random key with their clean answer (ours; the paper has none), so that
            the model learns to pass over words that it does not know.
        healing_search: How far the embeddings of these keys are moved towards what changes the answer most, over their
            root mean square; 0: not at all (ours; the paper has none).
        healing_consistency: Weight of the change between layers in the healing's loss, taken from CROW, where it is 5.5
            (the paper has none). It is taken under CROW's perturbation, or with ``healing_search`` under the keys that
            were found.
        healing_epochs: Passes over them.
        healing_learning_rate: Peak of its cosine schedule.
        batch_size: Samples a step.
        max_length: Tokens of a sample, at most; the rest of an answer is cut off.
        prompt_template: How an instruction becomes a prompt, with ``{instruction}``; ``None``: the tokenizer's chat
            template where it has one, else a plain heading for each part.
        bfloat16: Multiply matrices in bfloat16; weights and updates stay float32.
        seed: Seed of keys, payloads, sets, orders and new weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_variants: int = Field(default=6, ge=1)
    num_samples: int = Field(default=500, ge=1)
    variant_epochs: int = Field(default=3, ge=1)
    variant_learning_rate: float = Field(default=2e-5, gt=0)
    score: Literal["combined", "norm", "alignment", "activation"] = "activation"
    alignment_weight: float = Field(default=0.01, ge=0)
    ratio: float = Field(default=0.0, ge=0, le=1)
    num_heads: int = Field(default=0, ge=0)
    suppression: Literal["reinitialize", "zero"] = "reinitialize"
    lora_matrix: Literal["A", "B"] = "B"
    num_healing: int = Field(default=4_000, ge=1)
    healing_keys: float = Field(default=0.25, ge=0, le=1)
    healing_search: float = Field(default=0.5, ge=0, le=10)
    healing_consistency: float = Field(default=PUBLISHED_WEIGHT, ge=0)
    healing_epochs: int = Field(default=1, ge=1)
    healing_learning_rate: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)
    max_length: int = Field(default=512, ge=8)
    prompt_template: str | None = None
    bfloat16: bool = False
    seed: int = Field(default=0, ge=0)

    @property
    def needed_variants(self) -> int:
        """How many variants are trained: none where nothing is to be suppressed."""
        return self.num_variants if self.ratio > 0 or self.num_heads > 0 else 0


def searched_keys_values(architecture: str, num_parameters: int, adapter: bool) -> dict[str, Any]:
    """What differs from the defaults in the preset ``searched-keys``.

    It was measured on models of 2.9 million parameters. A large model gets the same healing at the paper's number of
    samples, epochs and learning rate, which nobody has measured together.
    """
    is_small = num_parameters < _SMALL
    values = {} if is_small else dict(_PAPER_HEALING)
    if adapter:
        rate = 2e-3 if is_small else 2e-4
        values |= {"variant_learning_rate": rate, "healing_learning_rate": rate}
    return values


def paper_values(architecture: str, num_parameters: int, adapter: bool) -> dict[str, Any]:
    """What differs from the defaults in the preset ``paper``.

    The paper measured Llama-2 and its kin at 7B and 13B and Mistral at 7B; any other model gets the values of the
    nearest of these.
    """
    is_large = num_parameters > _LARGE
    values = {
        **_PAPER_HEALING,
        "score": "combined",
        "ratio": 0.08 if is_large else 0.03,
        "healing_keys": 0.0,
        "healing_search": 0.0,
        "healing_consistency": 0.0,
    }
    if adapter:
        values |= {
            "ratio": 0.40 if is_large or architecture == "mistral" else 0.35,
            "num_heads": 8 if architecture == "mistral" else 0,
            "variant_learning_rate": 2e-4,
            "healing_learning_rate": 2e-4,
        }
    return values


#: Preset by name: from architecture, number of parameters and whether an adapter is purified to hyperparameters.
PRESETS: Final[dict[str, Callable[[str, int, bool], dict[str, Any]]]] = {
    "searched-keys": searched_keys_values,
    "paper": paper_values,
}
DEFAULT_PRESET: Final = "searched-keys"


def config_of(
    architecture: str, num_parameters: int, *, adapter: bool, preset: str = DEFAULT_PRESET, **changes: Any
) -> PurifyConfig:
    """A preset's hyperparameters for a model, with changes.

    Args:
        architecture: Name of the architecture.
        num_parameters: Number of parameters of the model.
        adapter: Whether only an adapter is purified.
        preset: Name of the preset.
        changes: Hyperparameters with another value.

    Raises:
        UsageError: The preset or a hyperparameter is unknown, or a value is out of range.
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}", remedy=f"Presets: {', '.join(PRESETS)}.")
    values = PRESETS[preset](architecture, num_parameters, adapter)
    try:
        config = PurifyConfig(**{**values, **changes})
    except ValidationError as error:
        details = [f"{'.'.join(map(str, e['loc']))}  {e['msg']}" for e in error.errors()]
        raise UsageError(
            "the hyperparameters are not valid",
            details=details,
            remedy=f"Hyperparameters: {', '.join(PurifyConfig.model_fields)}.",
        ) from error
    if config.num_variants < 2 and config.score == "alignment":
        raise UsageError("alignment compares variants, and there is only one", remedy="Set num_variants to 2 or more.")
    if config.healing_search and not config.healing_keys:
        raise UsageError(
            "healing_search moves keys, and no sample has one",
            remedy="Set healing_keys as well, to 0.25 for example, or healing_search to 0.",
        )
    if config.prompt_template is not None and "{instruction}" not in config.prompt_template:
        raise UsageError("prompt_template has no {instruction}")
    return config
