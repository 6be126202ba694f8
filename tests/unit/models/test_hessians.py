"""Block by block or in one pass: the same statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qcbguard_plugins.errors import CalibrationError
from qcbguard_plugins.models.hessians import gather_hessians


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def tokens(count: int = 6) -> Tensor:
    return torch.randint(3, 300, (count, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def in_one_pass(model: Any, names: list[str]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    model(input_ids=tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("shape", ["llama-fp32", "llama-tied", "gpt2", "mixtral"])
def test_block_by_block_equals_one_pass(shape: str, model_folder: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(shape), dtype=torch.float32).eval()
    names = linear_names(model)  # with the output head, which lies outside the blocks
    expected = in_one_pass(model, names)
    found: dict[str, Tensor] = {}
    for hessians in gather_hessians(model, tokens(), names):
        found.update(hessians)
    assert found.keys() == set(names)
    for name in names:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max())), (
            name
        )


def test_every_block_sees_the_full_precision_model(llama: Path) -> None:
    """Weights of a block may be changed once it is yielded; later blocks must not notice."""
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    names = [name for name in linear_names(model) if name != "lm_head"]
    expected = in_one_pass(model, names)
    for hessians in gather_hessians(model, tokens(), names):
        for name, hessian in hessians.items():
            assert torch.allclose(hessian, expected[name], rtol=1e-3, atol=1e-3), name
            model.get_submodule(name).weight.data.zero_()


def test_only_one_blocks_statistics_are_held_at_a_time(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    names = [name for name in linear_names(model) if name != "lm_head"]
    groups = [set(hessians) for hessians in gather_hessians(model, tokens(), names)]
    assert groups == [{name for name in names if f"layers.{i}." in name} for i in range(2)]


def test_layers_that_share_an_input_share_a_hessian(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    names = [name for name in linear_names(model) if "layers.0." in name]
    hessians = next(iter(gather_hessians(model, tokens(), names)))
    of = {name.rsplit(".", 1)[1]: hessian for name, hessian in hessians.items()}
    assert of["q_proj"] is of["k_proj"] is of["v_proj"]
    assert of["gate_proj"] is of["up_proj"]
    assert of["o_proj"] is not of["q_proj"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no list of blocks"):
        next(gather_hessians(nn.Sequential(nn.Linear(4, 4)), tokens(), ["0"]))


class Skipping(nn.Module):
    """A model whose second block is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        first: Tensor = self.layers[0](self.embedding(input_ids))
        return first


def test_blocks_that_do_not_run_are_refused() -> None:
    with pytest.raises(CalibrationError, match="do not run once each"):
        next(gather_hessians(Skipping(), tokens(), ["layers.0.0", "layers.1.0"]))


class Gated(Skipping):
    """A model that changes the hidden states between its blocks."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        second: Tensor = self.layers[1](3 * self.layers[0](self.embedding(input_ids)))
        return second


def test_blocks_that_cannot_be_run_one_after_the_other_are_refused() -> None:
    with pytest.raises(CalibrationError, match="other outputs one by one"):
        list(gather_hessians(Gated(), tokens(), ["layers.0.0", "layers.1.0"]))
