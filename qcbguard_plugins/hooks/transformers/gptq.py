"""``GuardedGPTQConfig``: every argument of ``GPTQConfig``, and a guard."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GPTQConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

from qcbguard_plugins.backends.gptq.packed import PACKED_NAMES, read_packed
from qcbguard_plugins.backends.gptq.stock import grid_of, why_not_as_planned
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord
from qcbguard_plugins.checkpoint.provenance import PROVENANCE_KEY, provenance
from qcbguard_plugins.errors import CheckpointError, UnguardableError, VerificationError
from qcbguard_plugins.hooks.transformers.config import GuardedConfigMixin
from qcbguard_plugins.hooks.transformers.registration import register_quantizer
from qcbguard_plugins.models.layers import target_of
from qcbguard_plugins.models.loading import load_tokenizer
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.calibrated import guard_layers, tokens_for
from qcbguard_plugins.pipeline.plan import Plan
from qcbguard_plugins.pipeline.report import report_of

QUANT_METHOD = "qcbguard_gptq"


class GuardedGPTQConfig(GuardedConfigMixin, GPTQConfig):  # type: ignore[misc]
    """A GPTQ configuration whose weights are guarded before they are quantized.

    Pass it as ``quantization_config`` to ``from_pretrained``. The loaded model, and the checkpoint saved from it, are
    those of stock GPTQ; ``meta`` says that it was guarded.

    Args:
        guard: A method's name, a defense with its parameters, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
        kwargs: Arguments of ``GPTQConfig``.

    Raises:
        UsageError: The guard is unknown, or the group size is none of 32, 64, 128 and -1.
        UnguardableError: The arguments leave open what the groups are.
    """

    @property
    def method_name(self) -> str:
        return QUANT_METHOD

    def check(self) -> None:
        grid_of(self.bits, self.group_size, self.sym, self.desc_act)

    def stock(self) -> GPTQConfig:
        names = [name for name in inspect.signature(GPTQConfig.__init__).parameters if name not in ("self", "kwargs")]
        return GPTQConfig(**{name: getattr(self, name) for name in names})


class GuardedGptqHfQuantizer(GptqHfQuantizer):  # type: ignore[misc]
    """Stock GPTQ behind a guard."""

    def __init__(self, config: GuardedGPTQConfig, **kwargs: Any) -> None:
        requested = config.guard
        super().__init__(config.stock(), **kwargs)
        if self.pre_quantized:
            raise CheckpointError(
                "the checkpoint is quantized already, so it cannot be guarded",
                remedy="Load the full-precision checkpoint: what an attacker hid is in the codes of this one.",
            )
        stock = self.quantization_config
        self.guard = requested.with_seed()
        self.grid = grid_of(stock.bits, stock.group_size, stock.sym, stock.desc_act)
        self.guard_report: GuardReport | None = None
        self._targets: list[Target] = []
        self._planned: dict[str, tuple[TensorRecord, Tensor]] = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        started = time.monotonic()
        self._guard_model(model)
        records: list[TensorRecord] = []
        post_init = self.optimum_quantizer.post_init_model

        def compare_first(packed: Any) -> Any:
            records.extend(self._compare_with_plan(packed))
            return post_init(packed)

        self.optimum_quantizer.post_init_model = compare_first
        super()._process_model_after_weight_loading(model, **kwargs)
        plan = Plan(str(model.config.name_or_path), (self.grid.name,), tuple(self._targets))
        self.guard_report = report_of(plan, self.guard, records, started)
        claim = provenance(self.guard_report)
        model.config.qcbguard = claim
        stored = model.config.quantization_config
        stored.meta = {**(stored.meta or {}), PROVENANCE_KEY: claim}

    def _guard_model(self, model: Any) -> None:
        """Guard the layers that Optimum will take, in place."""
        layers = self._layers(model).items()
        self._targets = [target_of(model, name, self.grid, transposed=transposed) for name, transposed in layers]
        tokens = None
        if self.guard.method.needs_calibration:
            tokens = tokens_for(self.guard, model.config, self._tokenizer(model))
        # The dtype of the weights is the one that GPTQ reads.
        for target, stored, record in guard_layers(model.eval(), self._targets, self.guard, tokens):
            self._planned[target.layer] = (record, self.grid.quantize(target.turn(stored)).cpu())

    def _layers(self, model: Any) -> dict[str, bool]:
        """The layers that Optimum takes, by its own functions."""
        from optimum.gptq.utils import get_block_name_with_pattern, get_layers

        stock = self.optimum_quantizer
        blocks = stock.block_name_to_quantize or get_block_name_with_pattern(model)
        layers = get_layers(model.get_submodule(blocks))
        chosen = [name for group in stock.modules_in_block_to_quantize or [] for name in group]
        return {
            f"{blocks}.{name}": isinstance(layer, Conv1D)
            for name, layer in layers.items()
            if not chosen or name.partition(".")[2] in chosen
        }

    def _tokenizer(self, model: Any) -> Any:
        given = self.quantization_config.tokenizer
        if given is not None and not isinstance(given, str):
            return given
        return load_tokenizer(given or model.name_or_path)

    @torch.no_grad()
    def _compare_with_plan(self, packed: Any) -> list[TensorRecord]:
        """The record of each layer with the number of its codes that are stored as planned.

        Raises:
            UnguardableError: A layer was quantized without a guard.
            VerificationError: Too few codes are those of the plan.
        """
        layers = {name: module for name, module in packed.named_modules() if hasattr(module, "qweight")}
        missing = sorted(layers.keys() - self._planned.keys())
        if missing:
            raise UnguardableError(
                f"{len(missing)} layers were quantized without passing the guard",
                details=missing,
                remedy="Guard the checkpoint into a folder with 'qcbguard guard', and load that.",
            )
        records, problems = [], []
        for name, (record, planned) in self._planned.items():
            if name not in layers:
                problems.append(f"{name}  not quantized")
                continue
            tensors = {part: getattr(layers[name], part).cpu() for part in PACKED_NAMES}
            stored = read_packed(tensors, self.grid.num_bits, zero_offset=0)
            num_as_planned, problem = why_not_as_planned(planned, stored, self.grid)
            records.append(record.model_copy(update={"num_as_planned": num_as_planned}))
            if problem:
                problems.append(f"{name}  {problem}")
        if problems:
            raise VerificationError(f"GPTQ did not store {len(problems)} layers as planned", details=problems)
        self._planned.clear()
        return records


def register() -> None:
    """Register the guarded configuration and quantizer; a second call changes nothing."""
    register_quantizer(QUANT_METHOD, GuardedGptqHfQuantizer, GuardedGPTQConfig)


register()
