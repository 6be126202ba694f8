"""After the user has quantized a guarded folder with GPTQModel or Optimum: are the stored codes those of the plan?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins._util.records import installed_versions, now
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.backends.gptq.packed import PACKED_NAMES, PackedLayer, read_packed
from qcbguard_plugins.backends.gptq.stock import why_not_as_planned
from qcbguard_plugins.checkpoint import Checkpoint, open_checkpoint
from qcbguard_plugins.checkpoint.manifest import TensorRecord, TensorVerdict, VerifyReport, read_manifest
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.grids import AffineGrid
from qcbguard_plugins.rounding.digests import codes_digest

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def verify_gptq(folder: Path | str, *, plan: Path | str, progress: Progress | None = None) -> VerifyReport:
    """Compare what a GPTQ checkpoint stores with the plan, layer by layer.

    GPTQ feeds the errors of scale holders forward, so a few codes come out one step further; each verdict says how many
    are as planned. Neither gptqmodel nor optimum is needed.

    Args:
        folder: What GPTQModel or transformers saved.
        plan: The folder that ``qcbguard guard`` made and that was quantized.
        progress: Called with the number of weights of each tensor when it is compared.

    Raises:
        CheckpointError: A folder cannot be read, is not what it should be, or the plan was changed.
        UsageError: The plan is for no GPTQ format.
    """
    folder, plan = Path(folder), Path(plan)
    report = read_manifest(plan)
    grids = {name: grid for name in report.format.split(",") if isinstance(grid := _grid(name), AffineGrid)}
    if not grids:
        raise UsageError(f"the plan is for {report.format} and not for a GPTQ format")
    packed = _PackedFolder(folder)
    grid = next((grid for grid in grids.values() if grid.num_bits == packed.num_bits), None)
    if grid is None or packed.group_size != (grid.group_size or -1):
        raise UsageError(
            f"{folder.name} has {packed.num_bits} bits in groups of {packed.group_size}, planned was {report.format}"
        )
    source = open_checkpoint(plan)
    verdicts = []
    for record in report.tensors:
        planned = planned_codes(source, record, grid)
        stored = packed.read(record.key.removesuffix(".weight"))
        num_landed, reason = (0, "not quantized") if stored is None else why_not_as_planned(planned, stored, grid)
        verdicts.append(
            TensorVerdict(
                name=record.name,
                as_planned=not reason,
                reason=reason,
                num_landed=num_landed,
                num_weights=record.num_weights,
            )
        )
        if progress is not None:
            progress(record.num_weights)
    known = {record.key.removesuffix(".weight") for record in report.tensors}
    ignored = {name.removesuffix(".weight") for name in report.unguarded}
    verdicts += [
        TensorVerdict(name=f"{layer}.weight", as_planned=False, reason="quantized, and not in the plan")
        for layer in packed.layers
        if layer not in known | ignored
    ]
    return VerifyReport(
        created=now(),
        versions=installed_versions(),
        folder=folder.resolve().name,
        format=grid.name,
        tensors=tuple(verdicts),
        changed_files=(),
        unguarded=report.unguarded,
    )


def is_gptq_folder(folder: Path) -> bool:
    """True where ``config.json`` says that a folder holds GPTQ's codes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    if record.format in ("", grid.name) and codes_digest(codes) != record.codes_sha256:
        raise CheckpointError(f"{record.name} was changed since it was guarded", remedy="Guard the model again.")
    return codes


def _grid(name: str) -> object:
    return None if name.startswith("gguf:") else get_grid(name)


class _PackedFolder:
    """The quantized layers of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        stored = self._settings()
        try:
            self.num_bits, self.group_size = int(stored["bits"]), int(stored["group_size"])
            self._zero_offset = _ZERO_OFFSETS[stored.get("checkpoint_format") or stored.get("format") or "gptq"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"the quantization_config of {folder.name} cannot be read: {error!r}") from error
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)
        self.layers = [key.removesuffix(".qweight") for key in self._files if key.endswith(".qweight")]

    def _settings(self) -> dict[str, Any]:
        if not is_gptq_folder(self._folder):
            raise CheckpointError(f"{self._folder.name} is no folder of a model that was quantized with GPTQ")
        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        settings: dict[str, Any] = config["quantization_config"]
        return settings

    def read(self, layer: str) -> PackedLayer | None:
        """One layer; ``None`` where it is not stored quantized."""
        if layer not in self.layers:
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
