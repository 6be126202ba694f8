"""A model of which one decoder block is in memory at a time, read from its checkpoint when it is due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcbguard_plugins.checkpoint import Checkpoint
from qcbguard_plugins.checkpoint.journal import read_span
from qcbguard_plugins.errors import CalibrationError, CheckpointError
from qcbguard_plugins.models.skeleton import build_skeleton, load_config, model_class, parameter_keys
from qcbguard_plugins.models.text_pass import stacks_of_blocks


class StreamedWeights:
    """The weights of a model whose blocks are empty until they are needed.

    Attributes:
        model: The model: everything outside its blocks has its weights, and a block has them while it runs.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, layers: list[str]) -> None:
        """Build the model.

        Args:
            checkpoint: Where the weights are.
            dtype: Dtype of the model.
            layers: Names of layers, most of which lie in the blocks.

        Raises:
            CalibrationError: The model has no blocks.
            CheckpointError: A parameter is not stored as one tensor, or not in the model's dtype alone.
        """
        self._checkpoint, self._dtype = checkpoint, dtype
        config = load_config(checkpoint.path)
        self._keys = parameter_keys(build_skeleton(config), checkpoint.tensors)
        self.model = _empty_model(config, dtype)
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        self._blocks = [block for stack in stacks_of_blocks(self.model, layers).values() for block in stack]
        if not self._blocks:
            raise CalibrationError(
                f"{type(self.model).__name__} has no list of blocks that could be in memory one by one",
                remedy="Raise --max-memory so that the whole model fits, or use --method stochastic.",
            )
        self._refuse_what_is_assembled()
        inside = {id(parameter) for block in self._blocks for parameter in block.parameters()}
        tied = _tied(self.model)
        for module in self.model.modules():
            self._fill(module, skip=inside | {id(self.model.get_parameter(name)) for name in tied})
        for name, other in tied.items():
            path, _, parameter = name.rpartition(".")
            self.model.get_submodule(path)._parameters[parameter] = self.model.get_parameter(other)
        self._empty = {id(block): dict(block.named_parameters()) for block in self._blocks}
        self._resident: set[int] = set()
        for block in self._blocks:
            block.register_forward_pre_hook(lambda module, _: self._load(module))
            block.register_forward_hook(lambda module, *_: self._drop(module))

    def weight(self, layer: str) -> Tensor:
        """The stored weight of a layer, read for the caller alone where its block is not in memory."""
        weight = self.model.get_parameter(f"{layer}.weight")
        return self._read(f"{layer}.weight") if weight.is_meta else weight.data

    @contextmanager
    def block(self, block: nn.Module) -> Iterator[None]:
        """Keep a block in memory; what was changed in it is gone afterwards."""
        self._load(block)
        self._resident.add(id(block))
        try:
            yield
        finally:
            self._resident.discard(id(block))
            self._drop(block)

    def _load(self, block: nn.Module) -> None:
        if any(parameter.is_meta for parameter in block.parameters()):
            for module in block.modules():
                self._fill(module, skip=set())

    def _drop(self, block: nn.Module) -> None:
        if id(block) in self._resident:
            return
        for name, empty in self._empty[id(block)].items():
            path, _, parameter = name.rpartition(".")
            block.get_submodule(path)._parameters[parameter] = empty

    def _fill(self, module: nn.Module, skip: set[int]) -> None:
        """Read the parameters of one module, but for those of its children."""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(parameter) not in skip:
                stored = self._read(self._names[id(parameter)])
                module._parameters[name] = nn.Parameter(stored, requires_grad=False)

    def _read(self, name: str) -> Tensor:
        entry = self._checkpoint.tensors[self._keys[name]]
        assert entry.dtype is not None, "checked before"
        data = read_span(self._checkpoint.path / entry.shard, entry.begin, entry.num_bytes)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape).to(self._dtype)

    def _refuse_what_is_assembled(self) -> None:
        tied = _tied(self.model)
        problems = [
            f"{name}  {_shape_of(parameter)}"
            for name, parameter in self.model.named_parameters()
            if name not in tied and not self._is_stored(name, parameter)
        ]
        if problems or getattr(self.model, "_keep_in_fp32_modules", None):
            raise CheckpointError(
                f"{self._checkpoint.path.name} cannot be read block by block: {len(problems)} parameters are not "
                "stored as they are in the model",
                details=problems,
                remedy="Raise --max-memory so that the whole model fits, or use --method stochastic.",
            )

    def _is_stored(self, name: str, parameter: Tensor) -> bool:
        entry = self._checkpoint.tensors.get(self._keys.get(name, ""))
        return entry is not None and entry.dtype is not None and entry.shape == tuple(parameter.shape)


def _empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model with its buffers and without its weights."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = model_class(config)._from_config(config, dtype=dtype)
    return model.eval()


def _tied(model: Any) -> Mapping[str, str]:
    """Parameters that share their weight with another, and that other."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _shape_of(parameter: Tensor) -> str:
    return str(tuple(parameter.shape))
