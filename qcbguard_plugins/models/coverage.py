"""What other quantizers of a format would take of a checkpoint, and this run does not guard.

transformers 5 keeps the experts of a block in one parameter, which its bitsandbytes quantizer leaves in full precision.
transformers 4, vLLM and Unsloth quantize the same tensors. A tensor that no module of the built-in class reads is
quantized by whoever does read it: vLLM's speculative decoding, or a class of the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import nn

from qcbguard_plugins.checkpoint.loaded_files import remote_model_classes
from qcbguard_plugins.checkpoint.uncovered import UncoveredTensor
from qcbguard_plugins.checkpoint.weight_source import is_target, may_be_target
from qcbguard_plugins.models.skeleton import loaded_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcbguard_plugins.checkpoint import Checkpoint, TensorEntry

_FUSED_EXPERTS = (
    "experts that transformers 5 keeps in one parameter and does not quantize; transformers 4, vLLM and Unsloth "
    "quantize them unguarded"
)
_EXPERT_MATRICES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# Below this a matrix is a table of positions or the like.
_SMALLEST_SIZE = 2048


def uncovered_tensors(
    skeleton: PreTrainedModel, checkpoint: Checkpoint, covered: Collection[str] = ()
) -> tuple[UncoveredTensor, ...]:
    """The tensors of a checkpoint that another quantizer would take and that are not guarded.

    Args:
        skeleton: The model without its weights, before any quantizer has changed it.
        checkpoint: The folder.
        covered: Names in the checkpoint of the tensors that are guarded, or that the user leaves out by name.

    Returns:
        In the order of the checkpoint.
    """
    names = loaded_names(skeleton, checkpoint.tensors)
    known = skeleton.state_dict().keys()
    experts = set(_fused_experts(skeleton))
    remote = remote_model_classes(checkpoint.config)
    model = type(skeleton).__name__
    found = []
    for key, entry in checkpoint.tensors.items():
        name = names[key][0]
        if key in covered:
            continue
        if name in experts:
            found.append(_uncovered(entry, _FUSED_EXPERTS))
        elif name not in known and remote and may_be_target(key, entry.shape) and _size(entry) >= _SMALLEST_SIZE:
            reason = f"no module of {model} reads them, and {', '.join(remote)} of auto_map, whose code is not run, may"
            found.append(_uncovered(entry, reason))
        elif name not in known and is_target(key, entry.shape) and _size(entry) >= _SMALLEST_SIZE:
            found.append(_uncovered(entry, f"no module of {model} reads them; other loaders may, and quantize them"))
    return tuple(found)


def _fused_experts(skeleton: PreTrainedModel) -> Iterator[str]:
    """Names of the parameters that hold the matrices of several experts."""
    for path, module in skeleton.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            of_experts = "expert" in path.lower() or "expert" in type(module).__name__.lower()
            is_fused = parameter.dim() == 3 and (of_experts or own in _EXPERT_MATRICES)
            # DBRX stacks its experts along the outputs, in a matrix.
            is_stacked = parameter.dim() == 2 and of_experts and not own.endswith("bias") and "router" not in name
            if is_fused or is_stacked:
                yield name


def _uncovered(entry: TensorEntry, reason: str) -> UncoveredTensor:
    return UncoveredTensor(
        key=entry.key, shape=entry.shape, num_weights=_size(entry), num_bytes=entry.num_bytes, reason=reason
    )


def _size(entry: TensorEntry) -> int:
    product = 1
    for size in entry.shape:
        product *= size
    return product
