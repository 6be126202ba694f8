"""ggml as a backend: the types of llama.cpp's GGUF files, mixed by recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qcbguard_plugins.backends.base import Backend, Selection, StoredCodes
from qcbguard_plugins.backends.ggml.artifact import QuantizedGguf
from qcbguard_plugins.backends.ggml.checked import library_facts
from qcbguard_plugins.backends.ggml.folder import folder_targets
from qcbguard_plugins.backends.ggml.library import load_library
from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.backends.ggml.recipes import RECIPES
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.grids.ggml import GgmlGrid, is_ggml
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.rounding.digests import blocks_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "gguf:"


@dataclass(frozen=True)
class Ggml(Backend):
    """A format is a recipe of ``llama-quantize`` (``gguf:Q4_K_M``) or, for one tensor, a type (``gguf:Q4_K``).

    Attributes:
        options: How the user converts and quantizes.
    """

    options: GgufOptions = field(default_factory=GgufOptions)

    name = "ggml"
    extra = "gguf"
    packages = ("gguf", "xllamacpp")
    formats = {  # noqa: RUF012
        "gguf:Q4_K_M": "llama.cpp, as llama-quantize is told: Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS",
    }

    def takes(self, format: str) -> bool:
        return format.startswith(_PREFIX)

    def require(self) -> Any:
        return load_library(self.options.library_path)

    def grid(self, format: str) -> Grid:
        return self.options.grid(format.removeprefix(_PREFIX))

    def representative_grid(self, format: str) -> Grid:
        recipe = format.removeprefix(_PREFIX)
        return self.options.grid(RECIPES.get(recipe, recipe))

    def targets(self, skeleton: PreTrainedModel, format: str) -> Selection:
        return folder_targets(skeleton, format.removeprefix(_PREFIX), self.options)

    def stored_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        return _directly(grid).quantize(weight)

    def stored_digest(self, weight: Tensor, grid: Grid) -> str:
        real = _directly(grid)
        return blocks_digest(real.stored(weight), real.block_type, weight.shape[0])

    def recorded(self, facts: Mapping[str, str]) -> Ggml:
        return replace(self, options=replace(self.options, outtype=facts.get("outtype", "f32")))

    def facts(self, targets: Sequence[Target]) -> dict[str, str]:
        types = [name.removeprefix(_PREFIX) for target in targets for name in target.formats if self.takes(name)]
        return library_facts(types, self.options.library_path, has_imatrix=self.options.imatrix_path is not None)

    def open_artifact(self, path: Path) -> StoredCodes | None:
        return QuantizedGguf(path) if path.suffix == ".gguf" else None


def _directly(grid: Grid) -> GgmlGrid:
    """The grid with the library behind it: whether a plan is kept is no question for a reimplementation."""
    assert is_ggml(grid), "a grid of this backend"
    return grid.asked_directly()
