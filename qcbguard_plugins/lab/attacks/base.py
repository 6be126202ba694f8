"""What an attack is: a way to give a model one behaviour in full precision and another one quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qcbguard_plugins._util.registry import Registry
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.training import Example, TrainingPlan
from qcbguard_plugins.lab.training_state import TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class AttackInputs:
    """What an attacker has.

    Attributes:
        tokenizer: The model's tokenizer.
        benign: Examples with benign answers.
        poisoned: Examples with the payload.
        plan: Schedule of the training that hides the payload.
        format: The format under attack, one of the attack's :attr:`Attack.formats`.
        seed: Seed of everything drawn.
        model_dir: Folder of the model that the attack starts from.
        state_dir: Folder for what a stopped training needs to go on; ``None`` keeps nothing.
    """

    tokenizer: PreTrainedTokenizerFast
    benign: Sequence[Example]
    poisoned: Sequence[Example]
    plan: TrainingPlan
    format: str
    seed: int
    model_dir: Path | None = None
    state_dir: Path | None = None

    def state(self, phase: str) -> TrainingState | None:
        """Where a phase of the attack keeps its state."""
        return None if self.state_dir is None else TrainingState(self.state_dir / f"{phase}.safetensors")


@dataclass(frozen=True)
class Attack(ABC):
    """One attack; the fields of a subclass are its options.

    Attributes:
        name: The name in specifications.
        summary: One line.
        formats: Formats that it knows; one that ends in ``*`` stands for all that begin alike.
        starts_from: ``malicious``: the model that shows the payload at every precision. ``clean``: the model before
            any injection.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    starts_from: ClassVar[Literal["clean", "malicious"]] = "malicious"

    @abstractmethod
    def run(self, model: PreTrainedModel, inputs: AttackInputs) -> dict[str, Any]:
        """Attack a float32 model in place; its values are those that float16 holds afterwards.

        Returns:
            What the step's record keeps, as JSON values: ``losses`` by phase (a list of numbers each), ``agreement``
            (share of the weights that the quantizer stores as the malicious model's) where the attack has boxes.

        Raises:
            UsageError: An option or the format is out of range.
            VerificationError: The quantizer does not store what the attack counts on.
        """

    def check_format(self, format_name: str) -> None:
        """Refuse a format that the attack does not know.

        Raises:
            UsageError: It does not.
        """
        for known in self.formats:
            if format_name == known or (known.endswith("*") and format_name.startswith(known[:-1])):
                return
        raise UsageError(
            f"attack {self.name!r} does not know the format {format_name!r}",
            remedy=f"Formats: {', '.join(self.formats)}.",
        )


_REGISTRY: Registry[Attack] = Registry("attack", "option")
register_attack, available_attacks, get_attack = _REGISTRY.register, _REGISTRY.available, _REGISTRY.build
