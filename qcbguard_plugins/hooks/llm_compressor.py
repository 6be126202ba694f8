"""A converter for llm-compressor's ``model_free_ptq``: weights are guarded on their way from the checkpoint's files.

    from llmcompressor import model_free_ptq
    from qcbguard_plugins.hooks.llm_compressor import GuardConverter

    model_free_ptq("MODEL", "QUANTIZED", scheme="W4A16", ignore=["lm_head", "model.embed_tokens"],
                   converter=GuardConverter("MODEL", "compressed-tensors:int4-g128", out_dir="QUANTIZED"))

The result is that of guarding the folder first and quantizing that, bit for bit. There is no model to run here, so the
method must be one that needs no calibration; for ``feedback`` guard the folder: ``qcbguard guard MODEL --for
compressed-tensors:int4-g128 --out GUARDED``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressed_tensors.entrypoints.convert import Converter
from torch import Tensor

from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord, write_manifest
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import UnguardableError, UsageError
from qcbguard_plugins.pipeline.guard_target import guard_target, verify_target
from qcbguard_plugins.pipeline.plan import make_plan
from qcbguard_plugins.pipeline.report import report_of
from qcbguard_plugins.pipeline.settings import Guard, as_guard
from qcbguard_plugins.pipeline.verify import require_as_planned


class GuardConverter(Converter):  # type: ignore[misc]
    """Guards every weight that will be quantized, file by file, and asks the quantizer's grid about each.

    Args:
        model_dir: The folder that ``model_free_ptq`` is given.
        formats: The format that it quantizes to.
        guard: A method's name, a defense, or a ``Guard``; one that needs no calibration.
        ignore: Patterns of target tensors to leave unguarded; the report lists them.
        out_dir: The folder that ``model_free_ptq`` writes; the manifest goes there.

    Attributes:
        report: What was guarded, once all of it is.

    Raises:
        UsageError: The method needs calibration, or the format is unknown.
        UnguardableError: A weight cannot be guarded.
        VerificationError: The quantizer would store other codes than planned.
    """

    def __init__(
        self,
        model_dir: str | Path,
        formats: Sequence[str] | str,
        guard: Guard | Defense | str = "stochastic",
        *,
        ignore: Sequence[str] = (),
        out_dir: str | Path | None = None,
    ) -> None:
        self._started = time.monotonic()
        self.guard = as_guard(guard).with_seed()
        if self.guard.method.needs_calibration:
            raise UsageError(
                f"{self.guard.method.name} needs a model to calibrate on, and there is none here",
                remedy="Use stochastic, or guard the folder with 'qcbguard guard' and quantize that.",
            )
        self.plan = make_plan(model_dir, formats, ignore=ignore)
        self.report: GuardReport | None = None
        self._out_dir = None if out_dir is None else Path(out_dir)
        self._targets = {target.key: target for target in self.plan.targets}
        self._records: dict[str, TensorRecord] = {}

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Guard the targets among the tensors of one file."""
        return {name: self._guard(name, tensor) for name, tensor in tensors.items()}

    def validate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are: a guard changes neither names nor shapes nor dtypes."""
        return tensors

    def update_config(self, config: Any) -> Any:
        """Leave the configuration alone, make the report, and refuse to finish where a target did not pass."""
        missing = sorted(self._targets.keys() - self._records.keys())
        if missing:
            raise UnguardableError(f"{len(missing)} tensors were not among the files", details=missing)
        self.report = report_of(self.plan, self.guard, list(self._records.values()), self._started)
        if self._out_dir is not None:
            write_manifest(self.report, self._out_dir)
        return config

    def get_dependencies(self, weight_name: str) -> set[str]:
        """None: every weight is guarded by itself."""
        return set()

    def _guard(self, name: str, tensor: Tensor) -> Tensor:
        target = self._targets.get(name)
        if target is None:
            return tensor
        guarded, record = guard_target(target, tensor, self.guard)
        require_as_planned([verify_target(target, guarded, record)])
        self._records[name] = record
        return guarded.contiguous()
