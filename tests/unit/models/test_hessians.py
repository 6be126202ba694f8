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


def test_a_model_that_takes_no_text_is_refused_unless_the_caller_hears_of_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match="takes no token ids"):
        next(gather_hessians(model, tokens(), ["0"]))
    unreached: dict[str, str] = {}
    assert not any(gather_hessians(model, tokens(), ["0"], unreached=unreached))
    assert unreached == {"0": "Sequential cannot be run on text, it takes no token ids"}


class Skipping(nn.Module):
    """A model whose second block is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        first: Tensor = self.layers[0](self.embedding(input_ids))
        return first


class Gated(Skipping):
    """A model that changes the hidden states between its blocks."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        second: Tensor = self.layers[1](3 * self.layers[0](self.embedding(input_ids)))
        return second


class Twice(Skipping):
    """A model that runs its blocks twice."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states: Tensor = self.embedding(input_ids)
        for block in [*self.layers, *self.layers]:
            states = block(states)
        return states


class _Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, states: Tensor) -> list[Tensor]:
        return [self.linear(states)]


class Listing(Skipping):
    """A model whose blocks return lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Listed(), _Listed()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states: list[Tensor] = [self.embedding(input_ids)]
        for block in self.layers:
            states = block(states[0])
        return states[0]


class Flat(nn.Module):
    """A model without a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(300, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(self.embedding(input_ids)))
        return result


class Halves(nn.Module):
    """An encoder-decoder: the second block reads what the first made of the same text, other in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 8)
        self.encoder = nn.ModuleList([nn.Linear(8, 8)])
        self.decoder = nn.ModuleList([Crossing(), Crossing()])

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        read, states = self.encoder[0](self.embedding(input_ids)), self.embedding(decoder_input_ids)
        for block in self.decoder:
            states = block(states, read=read)
        result: Tensor = states
        return result


class Crossing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, states: Tensor, read: Tensor) -> Tensor:
        result: Tensor = self.own(states) + self.other(read)
        return result


def test_a_layer_that_is_never_run_is_named_and_the_others_are_gathered() -> None:
    unreached: dict[str, str] = {}
    groups = list(gather_hessians(Skipping(), tokens(), ["layers.0.0", "layers.1.0"], unreached=unreached))
    assert {name for group in groups for name in group} == {"layers.0.0"}
    assert unreached == {"layers.1.0": "no calibration text reaches it"}
    with pytest.raises(CalibrationError, match=r"reached 1 layers\n.*layers\.1\.0  no calibration text"):
        list(gather_hessians(Skipping(), tokens(), ["layers.0.0", "layers.1.0"]))


@pytest.mark.parametrize("kind", [Gated, Twice, Listing, Flat, Halves])
def test_a_model_that_is_no_stack_of_blocks_is_run_whole(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the statistics of one layer at a time, and the caller changing what it has been given."""
    torch.manual_seed(0)
    model = kind()
    names = linear_names(model)
    expected: dict[str, Tensor] = {}
    for group in gather_hessians(model, tokens(10), names):
        expected |= {name: hessian.clone() for name, hessian in group.items()}
    assert expected.keys() == set(names)
    monkeypatch.setattr("qcbguard_plugins.models.hessians._MAX_STATISTICS_BYTES", 1)
    for group in gather_hessians(model, tokens(10), names):
        assert len(group) == 1
        for name, hessian in group.items():
            # A layer that runs again is measured behind what was changed by then.
            if kind is not Twice:
                assert torch.allclose(hessian, expected[name], rtol=1e-4), name
            model.get_submodule(name).weight.data.zero_()


def test_blocks_that_return_lists_are_run_one_after_the_other() -> None:
    names = ["layers.0.linear", "layers.1.linear"]
    assert [list(group) for group in gather_hessians(Listing(), tokens(), names)] == [[name] for name in names]


def test_statistics_of_a_whole_pass_are_those_of_the_inputs() -> None:
    torch.manual_seed(0)
    model = Gated()
    gathered: dict[str, Tensor] = {}
    for group in gather_hessians(model, tokens(10), linear_names(model)):
        gathered |= group
    with torch.no_grad():
        first = model.embedding(tokens(10)).reshape(-1, 8)
        second = 3 * model.layers[0](first)
    assert torch.allclose(gathered["layers.0.0"], first.T @ first, rtol=1e-4)
    assert torch.allclose(gathered["layers.1.0"], second.T @ second, rtol=1e-4)


class Overflowing(Flat):
    """A model whose hidden states leave what float16 holds."""

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(self.embedding(input_ids)) * float("inf"))
        return result


class Breaking(Skipping):
    """A model that breaks in its second block, on all but the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = _Breaks()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        result: Tensor = self.layers[1](self.layers[0](self.embedding(input_ids)))
        return result


class _Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, states: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("no more")
        result: Tensor = self.linear(states)
        return result


def test_what_overflows_or_breaks_is_named() -> None:
    unreached: dict[str, str] = {}
    groups = list(gather_hessians(Overflowing(), tokens(), ["first", "second"], unreached=unreached))
    assert {name for group in groups for name in group} == {"first"}
    assert unreached == {"second": "its inputs overflow on the calibration text"}
    unreached.clear()
    groups = list(gather_hessians(Breaking(), tokens(16), ["layers.0.0", "layers.1.linear"], unreached=unreached))
    assert {name for group in groups for name in group} == {"layers.0.0"}
    assert unreached == {"layers.1.linear": "Breaking breaks on text (RuntimeError: no more)"}
