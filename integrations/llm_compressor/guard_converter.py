"""A converter for llm-compressor's ``model_free_ptq``: weights are guarded on their way from the checkpoint's files.

    from llmcompressor import model_free_ptq
    from guard_converter import GuardConverter

    model_free_ptq("MODEL", "QUANTIZED", scheme="W4A16", ignore=["lm_head", "model.embed_tokens"],
                   converter=GuardConverter("MODEL", "compressed-tensors:int4-g128"))

The result is that of guarding the folder first and quantizing that, bit for bit. There is no model to run here, so the
method must be one that needs no calibration; for ``feedback`` guard the folder: ``qcbguard guard MODEL --for
compressed-tensors:int4-g128 --out GUARDED``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressed_tensors.entrypoints.convert import Converter
from torch import Tensor

from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import UnguardableError, UsageError
from qcbguard_plugins.pipeline.plan import make_plan
from qcbguard_plugins.pipeline.settings import Guard, as_guard
from qcbguard_plugins.pipeline.target import Target
from qcbguard_plugins.rounding.guard_weight import guard_weight


class GuardConverter(Converter):
    """Guards every weight that will be quantized, file by file.

    Args:
        model_dir: The folder that ``model_free_ptq`` is given.
        format: The format that it quantizes to.
        guard: A method's name, a defense, or a ``Guard``; one that needs no calibration.

    Raises:
        UsageError: The method needs calibration, or the format is unknown.
        UnguardableError: A weight cannot be guarded.
    """

    def __init__(self, model_dir: str | Path, format: str, guard: Guard | Defense | str = "stochastic") -> None:
        self.guard = as_guard(guard).with_seed()
        if self.guard.method.needs_calibration:
            raise UsageError(
                f"{self.guard.method.name} needs a model to calibrate on, and there is none here",
                remedy="Use stochastic, or guard the folder with 'qcbguard guard' and quantize that.",
            )
        self.plan = make_plan(model_dir, format)
        self._targets: dict[str, Target] = {target.key: target for target in self.plan.targets}
        self._guarded: set[str] = set()

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Guard the targets among the tensors of one file."""
        return {name: self._guard(name, tensor) for name, tensor in tensors.items()}

    def validate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are: a guard changes neither names nor shapes nor dtypes."""
        return tensors

    def update_config(self, config: Any) -> Any:
        """Leave the configuration alone, and refuse to finish where a target did not pass."""
        missing = sorted(self._targets.keys() - self._guarded)
        if missing:
            raise UnguardableError(f"{len(missing)} tensors were not among the files", details=missing)
        return config

    def get_dependencies(self, weight_name: str) -> set[str]:
        """None: every weight is guarded by itself."""
        return set()

    def _guard(self, name: str, tensor: Tensor) -> Tensor:
        target = self._targets.get(name)
        if target is None:
            return tensor
        assert self.guard.seed is not None, "the seed is drawn once a run"
        weight = (tensor.T if target.transposed else tensor).to(target.read_dtype)
        (grid,) = self.plan.grids(target)
        guarded = guard_weight(weight, grid, self.guard.method, seed=self.guard.seed, name=target.name).weight
        self._guarded.add(name)
        return (guarded.T if target.transposed else guarded).to(tensor.dtype).contiguous()
