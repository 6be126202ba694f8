"""Quantizers of transformers that work parameter by parameter: a guard in front, everything behind it stock.

The guarded method names dispatch here. Each quantizer swaps the configuration for a stock one at once, so all that
follows, the saved checkpoint included, is the stock tool's. The guard sits where transformers quantizes a parameter and
hands on the weight, guarded; what the tool then stores is compared with the plan.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.checkpoint.journal import bytes_of, hash_bytes
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord
from qcbguard_plugins.checkpoint.provenance import PROVENANCE_KEY, provenance
from qcbguard_plugins.defenses import Stochastic, WholeModelDefense
from qcbguard_plugins.errors import (
    CheckpointError,
    QcbguardError,
    UncalibratableError,
    UnguardableError,
    VerificationError,
)
from qcbguard_plugins.hooks.transformers.after_loading import forget_provenance, has_adapters, warn_of_adapters
from qcbguard_plugins.hooks.transformers.calibrated_cache import CalibratedWeights, calibrated_weights
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.models.text_pass import one_line
from qcbguard_plugins.pipeline.guard_target import Evidence, guard_target
from qcbguard_plugins.pipeline.plan import Plan
from qcbguard_plugins.pipeline.report import report_of
from qcbguard_plugins.pipeline.settings import Guard
from qcbguard_plugins.rounding.digests import codes_digest


class GuardThenQuantize(ConversionOps):  # type: ignore[misc]
    """The conversion of one parameter: the guard, then the stock operation."""

    def __init__(self, quantizer: GuardedHfQuantizerMixin, stock: ConversionOps) -> None:
        self.quantizer = quantizer
        self.stock = stock

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Guard, quantize, and compare what was stored with the plan.

        transformers swallows what is raised here and goes on, so a failure is kept and raised once, when all weights
        are there: the load fails either way.
        """
        guarded: dict[str, Any] = {}
        records: dict[str, TensorRecord] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            try:
                weight, records[name] = self.quantizer.guard_parameter(name, weight, module)
            except QcbguardError as error:
                self.quantizer.failures[name] = error
            guarded[name] = [weight]
        quantized: dict[str, Any] = self.stock.convert(guarded, full_layer_name=full_layer_name, model=model, **kwargs)
        for name, record in records.items():
            # Some quantizers put the parameter into its module themselves.
            parameter = quantized[name] if name in quantized else model.get_parameter(name)
            self.quantizer.compare_with_plan(parameter, record)
        return quantized


def _warn_of_data_free(report: GuardReport) -> None:
    """Say which layers got stochastic rounding where a calibrated method was asked for."""
    for why, names in report.data_free.items():
        warnings.warn(
            f"{len(names)} of {report.num_targets} tensors are guarded by stochastic rounding, which needs no data: "
            f"{why}. The first is {names[0]}; the report lists all.",
            stacklevel=2,
        )


def _digest_of(scales: Any) -> str:
    parts = scales if isinstance(scales, tuple) else (scales,)
    return "".join(hash_bytes(bytes_of(part)) for part in parts if isinstance(part, Tensor))


class GuardedHfQuantizerMixin(ABC):
    """The guard in front of a stock quantizer.

    A subclass of it and of the stock one says what is the backend's own.
    """

    backend: ClassVar[Backend]
    quantization_config: Any
    pre_quantized: bool

    @abstractmethod
    def format_of(self, config: Any) -> str:
        """The format that a stock configuration stands for."""

    @abstractmethod
    def layers_to_quantize(self, model: Any) -> Iterable[tuple[str, Any]]:
        """Names and modules of the layers that the stock quantizer will take, on a model without weights."""

    @abstractmethod
    def stored_codes(self, parameter: Any, shape: torch.Size) -> Tensor:
        """uint8 ``[out_features, in_features]``, what a quantized parameter stores: indices into the grid's levels."""

    @abstractmethod
    def is_quantized(self, parameter: Any) -> bool:
        """True for a parameter that the stock quantizer has quantized."""

    def scales_of(self, parameter: Any) -> Any:
        """What a quantized parameter stores beside its codes: tensors, or ``None`` where that is not looked at."""
        return None

    def is_transposed(self, module: Any) -> bool:
        """True for a layer whose checkpoint stores ``[in_features, out_features]``."""
        return False

    def __init__(self, config: Any, **kwargs: Any) -> None:
        self.requested = config.guard
        super().__init__(config.stock(), **kwargs)  # type: ignore[call-arg]
        if self.pre_quantized:
            raise CheckpointError(
                "the checkpoint is quantized already, so it cannot be guarded",
                remedy="Load the full-precision checkpoint: what an attacker hid is in the codes of this one.",
            )
        self.guard: Guard = self.requested.with_seed()
        self.format = self.format_of(self.quantization_config)
        self.grid = self.backend.grid(self.format)
        self.targets: dict[str, Target] = {}
        self.records: dict[str, TensorRecord] = {}
        self.failures: dict[str, QcbguardError] = {}
        self._scales: dict[str, str] = {}
        self.calibrated: CalibratedWeights | None = None
        self._cache = contextlib.ExitStack()
        self._why_data_free = ""
        self.guard_report: GuardReport | None = None
        self._start_s = time.monotonic()
        self._loading: tuple[Any, list[str], torch.dtype | None] | None = None
        self._prepared = False

    def preprocess_model(
        self, model: Any, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        self._loading = (model, list(checkpoint_files or []), dtype)
        return super().preprocess_model(  # type: ignore[misc]
            model=model, dtype=dtype, checkpoint_files=checkpoint_files, **kwargs
        )

    def get_weight_conversions(self) -> Any:
        # The first hook that runs outside transformers' meta-device contexts, so a model can be loaded and run here.
        if not self._prepared:
            self._prepared = True
            if self.guard.method.needs_calibration:
                self._calibrate()
        return super().get_weight_conversions()  # type: ignore[misc]

    def _calibrate(self) -> None:
        assert self._loading is not None, "transformers has made the skeleton"
        model, files, dtype = self._loading
        layers = {name: self.is_transposed(module) for name, module in self.layers_to_quantize(model)}
        try:
            self.calibrated = self._cache.enter_context(
                calibrated_weights(model, [Path(f) for f in files], dtype, layers, self.grid, self.requested)
            )
        except UncalibratableError as error:
            if isinstance(self.guard.method, WholeModelDefense):
                raise
            self._go_on_data_free(error.summary)
        except QcbguardError:
            raise
        except Exception as error:  # a model may break in any way where stock and stochastic rounding do not run it
            self._go_on_data_free(f"calibration broke ({one_line(error)})")
        else:
            self.guard = self.calibrated.guard

    def _go_on_data_free(self, why: str) -> None:
        """Guard all layers by stochastic rounding: stock would finish this load."""
        self._why_data_free = why
        self.guard = replace(self.guard, method=Stochastic())

    def get_quantize_ops(self) -> GuardThenQuantize:
        return GuardThenQuantize(self, super().get_quantize_ops())  # type: ignore[misc]

    def guard_parameter(self, name: str, stored: Tensor, module: Any) -> tuple[Tensor, TensorRecord]:
        """The guarded weight in the stored orientation, and the plan for it."""
        transposed = self.is_transposed(module)
        shape = stored.shape[::-1] if transposed else stored.shape
        self.targets[name] = Target(name, (shape[0], shape[1]), stored.dtype, (self.grid,), transposed)
        why_data_free = self._why_data_free
        if self.calibrated is not None:
            if self.calibrated.is_of(name, stored):
                weight, record = self.calibrated.get(name)
                return weight.to(stored.device), record
            why_data_free = "the load gives it another weight than calibration read"
        return guard_target(self.targets[name], stored, self.guard, Evidence(why_data_free=why_data_free))

    def compare_with_plan(self, parameter: Any, record: TensorRecord) -> None:
        """Keep a record of a parameter that is stored as planned, or a failure."""
        codes = self.stored_codes(parameter, torch.Size(record.shape))
        if codes_digest(codes) == record.codes_sha256:
            self.records[record.name] = record
            self._scales[record.name] = _digest_of(self.scales_of(parameter))
        else:
            self.failures[record.name] = VerificationError(
                f"{record.name}: {self.backend.name} stored other codes than planned"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._raise_if_incomplete(model)
        self._loading = None
        self.calibrated = None
        self._cache.close()
        targets = tuple(target for name, target in self.targets.items() if name in self.records)
        plan = Plan(str(model.config.name_or_path), (self.format,), targets)
        self.guard_report = report_of(plan, self.guard, list(self.records.values()), self._start_s)
        _warn_of_data_free(self.guard_report)
        model.config.qcbguard = provenance(self.guard_report)
        model.register_state_dict_pre_hook(warn_of_adapters)
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]

    def _raise_if_incomplete(self, model: Any) -> None:
        if self.failures:
            kinds = {type(error) for error in self.failures.values()}
            kind = kinds.pop() if len(kinds) == 1 else UnguardableError
            details = [error.summary for error in self.failures.values()]
            remedy = next((error.remedy for error in self.failures.values() if error.remedy), "")
            raise kind(f"{len(details)} tensors could not be guarded for {self.format}", details=details, remedy=remedy)
        missing = [
            f"{name}  quantized without a guard"
            for name, parameter in model.named_parameters()
            if self.is_quantized(parameter) and name not in self.records
        ]
        if missing:
            raise UnguardableError(
                f"{len(missing)} tensors were quantized without passing the guard",
                details=missing,
                remedy="Guard the checkpoint into a folder with 'qcbguard guard', and load that.",
            )

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, str]]:
        """What ``save_pretrained`` stores, with the guard in each file's header if it is still that of the weights."""
        state_dict, metadata = super().get_state_dict_and_metadata(model, *args, **kwargs)  # type: ignore[misc]
        assert self.guard_report is not None
        if has_adapters(model):  # only they are stored, and they were not guarded
            return state_dict, metadata
        changed = self._changed_since_loading(model)
        if changed:
            forget_provenance(model, f"{len(changed)} of its weights were changed after loading, {changed[0]} first")
            return state_dict, metadata
        return state_dict, {**metadata, PROVENANCE_KEY: json.dumps(provenance(self.guard_report))}

    def _dequantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        forget_provenance(model, "it is no longer quantized")
        return super()._dequantize(model, *args, **kwargs)  # type: ignore[misc]

    def _changed_since_loading(self, model: Any) -> list[str]:
        """The guarded parameters that are gone, or that store something else than they did."""
        assert self.guard_report is not None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [record.name for record in self.guard_report.tensors if not self._is_as_loaded(parameters, record)]

    def _is_as_loaded(self, parameters: Mapping[str, Any], record: TensorRecord) -> bool:
        parameter = parameters.get(record.name)
        if parameter is None or not self.is_quantized(parameter):
            return False
        try:
            codes = self.stored_codes(parameter, torch.Size(record.shape))
        except (RuntimeError, ValueError, AttributeError):  # a weight of another shape, or of no quantizer
            return False
        scales = self._scales.get(record.name)
        return codes_digest(codes) == record.codes_sha256 and scales == _digest_of(self.scales_of(parameter))
