"""After the user has quantized a guarded folder with GPTQModel or Optimum: are the stored codes those of the plan?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcbguard_plugins.backends.base import StoredCodes
from qcbguard_plugins.backends.gptq.packed import PACKED_NAMES, PackedLayer, read_packed
from qcbguard_plugins.backends.gptq.stock import affine_grid, why_not_as_planned
from qcbguard_plugins.checkpoint import Checkpoint, open_checkpoint
from qcbguard_plugins.checkpoint.loaded_files import CONFIG_FILE
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord, TensorVerdict, read_manifest
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.grids import AffineGrid
from qcbguard_plugins.rounding.digests import codes_digest

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def is_gptq_folder(folder: Path) -> bool:
    """True where ``config.json`` says that a folder holds GPTQ's codes."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(stored, dict) and stored.get("quant_method") == "gptq"


def planned_codes(source: Checkpoint, record: TensorRecord, grid: AffineGrid) -> Tensor:
    """The codes that a guarded folder plans for one tensor: uint8 ``[out_features, in_features]``.

    Raises:
        CheckpointError: The tensor was changed since it was guarded.
    """
    weight = source.read(record.key)
    weight = (weight.T if record.transposed else weight).to(getattr(torch, record.read_dtype))
    codes = grid.quantize(weight)
    if record.formats in ((), (grid.name,)) and codes_digest(codes) != record.codes_sha256:
        raise CheckpointError(f"{record.name} was changed since it was guarded", remedy="Guard the model again.")
    return codes


class PackedFolder(StoredCodes):
    """A folder that GPTQModel or transformers saved. Neither gptqmodel nor optimum is needed to read it.

    GPTQ feeds the errors of scale holders forward, so a few codes come out one step further; each verdict says how many
    are as planned.
    """

    def __init__(self, path: Path) -> None:
        """Open a folder that :func:`is_gptq_folder`.

        Raises:
            CheckpointError: Its settings cannot be read.
        """
        self.path = path
        stored = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["quantization_config"]
        try:
            self.num_bits, self.group_size = int(stored["bits"]), int(stored["group_size"])
            self._zero_offset = _ZERO_OFFSETS[stored.get("checkpoint_format") or stored.get("format") or "gptq"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"the quantization_config of {path.name} cannot be read: {error!r}") from error
        self._files: dict[str, Path] = {}
        for shard in sorted(path.glob("*.safetensors")):
            with _opened(shard) as file:
                self._files |= dict.fromkeys(file.keys(), shard)
        self._layers = [key.removesuffix(".qweight") for key in self._files if key.endswith(".qweight")]
        self._key_of: dict[str, str] = {}

    def find_plan(self, plan: Path | None) -> GuardReport:
        if plan is None:
            raise UsageError(
                f"{self.path.name} is a folder that GPTQ wrote, and carries no plan",
                remedy=f"Name the guarded folder that it was made from: qcbguard verify {self.path} --plan GUARDED",
            )
        report = read_manifest(plan)
        grids = [affine_grid(name) for name in report.formats if name.startswith("gptq-")]
        if not grids:
            raise UsageError(f"the plan is for {', '.join(report.formats)} and not for a GPTQ format")
        grid = next((grid for grid in grids if grid.num_bits == self.num_bits), None)
        if grid is None or self.group_size != (grid.group_size or -1):
            raise UsageError(
                f"{self.path.name} has {self.num_bits} bits in groups of {self.group_size}, planned was "
                f"{', '.join(report.formats)}"
            )
        self._grid, self._source = grid, open_checkpoint(plan)
        self._key_of = {record.key.removesuffix(".weight"): record.name for record in report.tensors}
        return report.model_copy(update={"formats": (grid.name,)})

    def compare(self, record: TensorRecord) -> TensorVerdict:
        planned = planned_codes(self._source, record, self._grid)
        stored = self._read(record.key.removesuffix(".weight"))
        num, reason = (0, "not quantized") if stored is None else why_not_as_planned(planned, stored, self._grid)
        return TensorVerdict(
            name=record.name, as_planned=not reason, reason=reason, num_as_planned=num, num_weights=record.num_weights
        )

    def quantized(self) -> Iterable[str]:
        return [self._key_of.get(layer, f"{layer}.weight") for layer in self._layers]

    def _read(self, layer: str) -> PackedLayer | None:
        """One layer; ``None`` where it is not stored quantized."""
        if layer not in self._layers:
            return None
        tensors = {}
        for name in PACKED_NAMES:
            key = f"{layer}.{name}"
            if key in self._files:
                with _opened(self._files[key]) as file:
                    tensors[name] = file.get_tensor(key)
        return read_packed(tensors, self.num_bits, zero_offset=self._zero_offset)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
