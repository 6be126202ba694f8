"""Where a model family keeps the parts that purification looks at, by module names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qcbguard_plugins.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Module names of one family.

    Attributes:
        name: What ``--architecture`` calls it.
        blocks: The list of transformer blocks.
        mlp_in: Modules of a block whose outputs are the MLP's channels: gate and up, or the first layer.
        mlp_out: The module that reads the channels.
        query: The module that makes the queries; of a fused one the queries come first.
        attention_out: The module that reads the heads' outputs.
        num_fused: How many times the channels follow each other in the outputs of a ``mlp_in`` module: 2 where gate and
            up are one module.
    """

    name: str
    blocks: str = "model.layers"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    query: str = "self_attn.q_proj"
    attention_out: str = "self_attn.o_proj"
    num_fused: int = 1


ARCHITECTURES: Final[dict[str, Architecture]] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("gemma"),
        Architecture("gemma2"),
        Architecture("gemma3_text"),
        Architecture("phi3", mlp_in=("mlp.gate_up_proj",), query="self_attn.qkv_proj", num_fused=2),
        Architecture("phi", mlp_in=("mlp.fc1",), mlp_out="mlp.fc2", attention_out="self_attn.dense"),
        Architecture("gpt2", "transformer.h", ("mlp.c_fc",), "mlp.c_proj", "attn.c_attn", "attn.c_proj"),
    )
}


def find_architecture(config: Any, choice: Architecture | str | None = None) -> Architecture:
    """The architecture of a model.

    Args:
        config: The model's configuration.
        choice: An architecture, or the name of one; by default the one of ``config.model_type``.

    Raises:
        UsageError: It is unknown; the message says what to pass.
    """
    if isinstance(choice, Architecture):
        return choice
    name = choice or str(getattr(config, "model_type", ""))
    if name not in ARCHITECTURES:
        raise UsageError(
            f"the module names of architecture {name!r} are unknown",
            remedy=f"Known: {', '.join(sorted(ARCHITECTURES))}. If its modules are named as in one of them, say so "
            "with --architecture NAME; else pass purify(architecture=Architecture(...)) with the names of its blocks, "
            "of the MLP's modules and of the attention's.",
        )
    return ARCHITECTURES[name]


def blocks_of(model: nn.Module, architecture: Architecture) -> dict[str, nn.Module]:
    """The transformer blocks by name, each with all modules that the architecture names.

    Raises:
        UsageError: A module is not there.
    """
    names = dict(model.named_modules())
    if architecture.blocks not in names:
        raise UsageError(
            f"the model has no {architecture.blocks}, which architecture {architecture.name!r} names its blocks",
            remedy="Pass the architecture whose module names these are.",
        )
    blocks = {f"{architecture.blocks}.{name}": block for name, block in names[architecture.blocks].named_children()}
    wanted = (*architecture.mlp_in, architecture.mlp_out, architecture.query, architecture.attention_out)
    missing = [f"{block}.{name}" for block in blocks for name in wanted if f"{block}.{name}" not in names]
    if missing or not blocks:
        raise UsageError(
            f"the model has not the modules of architecture {architecture.name!r}",
            details=missing,
            remedy="Mixtures of experts and hybrid models cannot be purified; for others pass the right architecture.",
        )
    return blocks
