"""The contract of a backend: one stock quantizer, what it reads, what it stores, how its files are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord, TensorVerdict
from qcbguard_plugins.errors import MissingDependencyError
from qcbguard_plugins.grids.base import Grid
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.rounding.digests import codes_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Selection:
    """What a stock quantizer takes of a model.

    Attributes:
        targets: The weights by parameter name; ``dtype`` is that of the model's configuration.
        facts: What the selection depends on besides the model, for the record.
    """

    targets: dict[str, Target]
    facts: dict[str, str] = field(default_factory=dict)


class StoredCodes(ABC):
    """A file or folder that a stock quantizer wrote, opened.

    Attributes:
        path: Where it is.
    """

    path: Path

    @abstractmethod
    def find_plan(self, plan: Path | None) -> GuardReport:
        """The manifest of the guard that was before the quantizer.

        Args:
            plan: Where the user says that it is; ``None`` to look into the artifact and beside it.

        Raises:
            CheckpointError: There is none, or it is malformed.
            UsageError: It is a plan for another quantizer, or for other settings.
        """

    @abstractmethod
    def compare(self, record: TensorRecord) -> TensorVerdict:
        """Whether one tensor is stored as planned. :meth:`find_plan` comes before."""

    @abstractmethod
    def quantized(self) -> Iterable[str]:
        """Names of all quantized tensors, as verdicts name them."""


class Backend(ABC):
    """One stock quantizer. No front door, no pipeline.

    Attributes:
        name: Its name, as in ``bitsandbytes``.
        extra: The extra of this distribution that installs it, as in ``bnb``; empty where there is none.
        packages: Distributions whose versions a manifest records.
        formats: Formats as users spell them, each with one line that says what it is.
        on_cuda: Whether it quantizes on an NVIDIA card.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    formats: ClassVar[Mapping[str, str]]
    on_cuda: ClassVar[bool] = False

    @abstractmethod
    def takes(self, format: str) -> bool:
        """True for a format that is spelled as this backend's are, whether there is such a one or not."""

    @abstractmethod
    def require(self) -> Any:
        """The stock quantizer's module.

        Raises:
            MissingDependencyError: It is not installed, or too old.
        """

    @abstractmethod
    def grid(self, format: str) -> Grid:
        """The grid of a format.

        Raises:
            UsageError: There is no such format.
            MissingDependencyError: The grid needs the real quantizer, and there is none.
        """

    @abstractmethod
    def targets(self, skeleton: PreTrainedModel, format: str) -> Selection:
        """What the quantizer takes of a model without weights, which it may change.

        Raises:
            UsageError: There is no such format, or the quantizer does not take such a model.
            UnguardableError: It takes weights that cannot be guarded.
        """

    def representative_grid(self, format: str) -> Grid:
        """One grid for a format, also where its tensors get several: that of most of them."""
        return self.grid(format)

    def stored_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The codes that the stock quantizer stores.

        Args:
            weight: Float ``[out_features, in_features]`` in the dtype that it reads.
            grid: One of this backend.

        Returns:
            uint8 ``[out_features, in_features]``, indices into the levels of the grid. Where the stock quantizer cannot
            be called for one weight, they are the grid's own, which the tests of the toolchain compare with it.
        """
        return grid.quantize(weight)

    def quick_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The same codes, possibly by a reimplementation of which the stock quantizer checks random blocks."""
        return self.stored_codes(weight, grid)

    def stored_digest(self, weight: Tensor, grid: Grid) -> str:
        """The digest of what the stock quantizer stores for a weight, as a plan records it."""
        return codes_digest(self.stored_codes(weight, grid))

    def facts(self, targets: Sequence[Target]) -> dict[str, str]:
        """Who answered for the stock quantizer in a run over these targets, for the record."""
        return {}

    def recorded(self, facts: Mapping[str, str]) -> Backend:
        """This backend with the settings that a manifest's facts record."""
        return self

    def notes(self) -> dict[str, str]:
        """What a user of this machine should know about the quantizer, by subject."""
        return {}

    def open_artifact(self, path: Path) -> StoredCodes | None:
        """Open what the quantizer wrote; ``None`` for a path that is no artifact of its own.

        Raises:
            CheckpointError: It is one, and cannot be read.
        """
        return None

    def missing(self, error: ImportError) -> MissingDependencyError:
        """The error that says which packages to install."""
        package = f"'qcbguard-plugins[{self.extra}]'" if self.extra else " ".join(self.packages)
        return MissingDependencyError(f"{self.name} is needed: {error}", remedy=f"pip install {package}")
