"""The compiled column loop of error feedback against the one in torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.defenses import ChoiceContext, Feedback, feedback, rng_for
from qcbguard_plugins.grids import Grid

FORMATS = [
    "nf4", "fp4", "int8", "gptq-w4g32", "gptq-w4g32-asym", "gptq-w8", "gguf:Q4_0", "gguf:Q8_0", "gguf:Q2_K",
    "gguf:Q6_K", "gguf:IQ4_XS",
]  # fmt: skip


def grid_of(name: str) -> Grid:
    return gguf_grid(name.removeprefix("gguf:")) if name.startswith("gguf:") else get_grid(name)


@pytest.mark.parametrize("width", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("name", FORMATS)
def test_the_loop_has_the_bits_of_torch(name: str, width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(70, 512, generator=generator) * 0.02
    weight[3] = 0
    inputs = torch.randn(600, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    lattice, hessian = grid_of(name).lattice_of(weight), inputs.T @ inputs
    compiled = Feedback(width=width).choose(lattice, ChoiceContext(rng_for(0, "w"), hessian))
    monkeypatch.setattr(feedback, "_load_kernel", lambda: None)
    assert torch.equal(compiled, Feedback(width=width).choose(lattice, ChoiceContext(rng_for(0, "w"), hessian)))
