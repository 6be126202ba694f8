"""How text goes through a model, whatever else the model takes.

A language model takes token ids and nothing else. An encoder-decoder takes them twice. A model of pictures and text
takes them alone, or has a method or a part that does. A model of sound, or of pictures alone, takes none.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Names that configurations have for the number of positions.
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def position_limit(config: Any) -> int | None:
    """The number of positions that a configuration states; ``None`` where it states none."""
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    stated = [getattr(part, name, None) for part in parts for name in _LIMITS]
    limits = [limit for limit in stated if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0]
    return min(limits, default=None)


def table_limit(model: nn.Module) -> int | None:
    """The longest sequence for which a model has positions, by its tables; ``None`` where it has none that count.

    RoBERTa and its relatives count positions from behind the padding token, so their tables hold some rows more than
    a sequence may have tokens.
    """
    limits = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "embed_positions")
    ]
    return min((limit for limit in limits if limit > 1), default=None)


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass early, once what it was run for is known."""


@dataclass
class TextPass:
    """One way of running text through a model.

    Attributes:
        name: What is called, for messages.
        run: Takes int64 ``[batch, length]``.
    """

    name: str
    run: Callable[[Tensor], Any]

    def __call__(self, tokens: Tensor) -> Any:
        return self.run(tokens)


@dataclass
class Reach:
    """Which layers one way of running text reaches.

    Attributes:
        way: Its place among :func:`text_passes`; -1 where none works.
        order: The layers that were reached, by the place of their last call.
        repeated: Those that were called more than once.
        problems: Why other ways do not work, a line each.
    """

    way: int = -1
    order: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def text_passes(model: Any) -> list[TextPass]:
    """The ways of running text through a model that are worth a try, the best one first."""
    ways = []
    if _takes_tokens(model.forward):
        ways.append(TextPass("the model", _with_tokens(model, model.forward)))
        if "use_cache" not in inspect.signature(model.forward).parameters:
            ways.append(TextPass("the model without use_cache", _with_tokens(model, model.forward, use_cache=None)))
    features = getattr(model, "get_text_features", None)
    if callable(features) and _takes_tokens(features):
        ways.append(TextPass("get_text_features", _with_tokens(features, features, use_cache=None)))
    for part in _text_parts(model):
        ways.append(TextPass(type(part).__name__, _with_tokens(part, part.forward)))
    return ways


def _text_parts(model: Any) -> list[Any]:
    """Parts of a model that take text without the rest."""
    parts = [getattr(model, name, None) for name in ("language_model", "text_model")]
    if callable(getattr(model, "get_decoder", None)) and not getattr(model.config, "is_encoder_decoder", False):
        parts.append(model.get_decoder())
    found: dict[int, Any] = {
        id(part): part for part in parts if isinstance(part, nn.Module) and part is not model and _takes_tokens(part)
    }
    return list(found.values())


def _takes_tokens(function: Any) -> bool:
    function = function.forward if isinstance(function, nn.Module) else function
    return "input_ids" in inspect.signature(function).parameters


def _with_tokens(call: Any, signature_of: Any, use_cache: bool | None = False) -> Callable[[Tensor], Any]:
    parameters = inspect.signature(signature_of).parameters
    constant = {} if use_cache is None else {"use_cache": use_cache}
    in_both_halves = "decoder_input_ids" in parameters

    def run(tokens: Tensor) -> Any:
        more = {"decoder_input_ids": _decoder_tokens(call, tokens)} if in_both_halves else {}
        return call(input_ids=tokens, **more, **constant)

    return run


def _decoder_tokens(model: Any, tokens: Tensor) -> Tensor:
    """The same text behind the token that a decoder starts with."""
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if not isinstance(start, int):
        return tokens
    return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)


@torch.no_grad()
def find_reach(model: Any, tokens: Tensor, names: Sequence[str]) -> Reach:
    """Try the ways on one sequence; the first that reaches a layer is taken.

    Args:
        model: The model.
        tokens: int64 ``[1, length]``.
        names: The layers that matter.
    """
    problems = []
    for number, way in enumerate(text_passes(model)):
        calls: list[str] = []
        handles = [
            model.get_submodule(name).register_forward_pre_hook(functools.partial(_note, calls, name)) for name in names
        ]
        try:
            way(tokens)
        except Exception as error:  # a model may break in any way on inputs that it was not made for
            problems.append(f"{way.name}: {one_line(error)}")
            continue
        finally:
            remove(handles)
        if calls:
            last_first = list(dict.fromkeys(reversed(calls)))
            repeated = {name for name, count in Counter(calls).items() if count > 1}
            return Reach(number, last_first[::-1], repeated, problems)
        problems.append(f"{way.name}: runs none of the layers")
    return Reach(problems=problems)


def _note(calls: list[str], name: str, *_: Any) -> None:
    calls.append(name)


def one_line(error: BaseException) -> str:
    """An error of a library in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def remove(handles: Sequence[RemovableHandle]) -> None:
    """Take hooks away."""
    for handle in handles:
        handle.remove()


def stacks_of_blocks(model: nn.Module, names: Sequence[str]) -> Mapping[str, list[nn.Module]]:
    """The outermost lists of blocks that hold any of the layers, by name."""
    stacks: dict[str, list[nn.Module]] = {}
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(list_name.startswith(f"{outer}.") for outer in stacks):
            continue
        if any(name.startswith(f"{list_name}.") for name in names):
            stacks[list_name] = list(module)
    return stacks
