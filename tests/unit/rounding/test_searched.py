"""What the guard hands to llama.cpp's quantizers is stored as chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qcbguard_plugins.backends.ggml.checked import checked_quantizer
from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.backends.ggml.library import load_library
from qcbguard_plugins.defenses import available_defenses, get_defense
from qcbguard_plugins.errors import MissingDependencyError, UnguardableError, UsageError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from qcbguard_plugins.rounding.digests import blocks_digest
from qcbguard_plugins.rounding.guard_weight import guard_weight
from tests.helpers.gguf_files import normal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def hessian(columns: int) -> torch.Tensor:
    inputs = normal(600, columns, seed=9, std=1.0)
    return inputs.T @ inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_ggml_stores_the_plan_and_the_plan_is_the_choice(name: str, dtype: torch.dtype) -> None:
    weight, grid = normal(128, 512).to(dtype), gguf_grid(name)
    guarded = guard_weight(weight, grid, get_defense("stochastic"), seed=0, name="w")
    stored = BLOCK_TYPES[name].read(load_library().quantize(BLOCK_TYPES[name], guarded.weight.float()))
    assert torch.equal(stored.codes.view(128, 512), guarded.codes)
    assert guarded.weight.dtype == dtype
    assert guarded.num_as_planned >= 0.99 * weight.numel()
    assert 0.1 * weight.numel() < guarded.num_moved < 0.3 * weight.numel()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_with_an_importance_matrix_too(name: str) -> None:
    weight, importance = normal(64, 512), normal(512, seed=3, std=1.0).abs() ** 3
    grid = gguf_grid(name, importance=importance)
    guarded = guard_weight(weight, grid, get_defense("stochastic"), seed=0, name="w")
    assert guarded.num_as_planned >= 0.99 * weight.numel()
    stored = BLOCK_TYPES[name].read(load_library().quantize(BLOCK_TYPES[name], guarded.weight, importance))
    assert torch.equal(stored.codes.view(64, 512), guarded.codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_rounding_at_random_leaves_none_of_the_error(name: str) -> None:
    """Plain rounding keeps all of its error, unbiased rounding none: that is what takes the attack's direction away."""
    weight, grid = normal(256, 512), gguf_grid(name)
    error = grid.values(grid.stored(weight)).view(weight.shape) - weight
    guarded = guard_weight(weight, grid, get_defense("stochastic"), seed=0, name="w")
    change = grid.values(grid.stored(guarded.weight)).view(weight.shape) - weight
    assert abs(float((error * change).sum() / error.square().sum())) < 0.1


@pytest.mark.parametrize("method", sorted(available_defenses()))
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q3_K", "Q4_K", "IQ4_XS"])
def test_every_defense_works_on_these_grids(method: str, name: str) -> None:
    weight = normal(32, 256)
    runs = [
        guard_weight(
            weight,
            gguf_grid(name),
            get_defense(method),
            seed=1,
            name="w",
            hessian=hessian(256),
            round_up=normal(32, 256) > 0,
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0].weight, runs[1].weight)
    assert runs[0].digest == runs[1].digest
    assert 0 < runs[0].num_moved < weight.numel()
    assert torch.equal(gguf_grid(name).quantize(runs[0].weight), runs[0].codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
def test_feedback_changes_a_layers_output_less_than_plain_rounding(name: str) -> None:
    weight, inputs = normal(64, 256), normal(600, 32, seed=9, std=1.0) @ normal(32, 256, seed=8, std=1.0)
    grid, gram = gguf_grid(name), inputs.T @ inputs
    plain = grid.values(grid.stored(weight)).view(weight.shape)
    guarded = guard_weight(weight, grid, get_defense("feedback"), seed=0, name="w", hessian=gram)
    kept = grid.values(grid.stored(guarded.weight)).view(weight.shape)
    assert (inputs @ (kept - weight).T).norm() < (inputs @ (plain - weight).T).norm()


@pytest.mark.parametrize("method", ["stochastic", "feedback"])
@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "Q4_K"])
def test_reordering_rows_and_quantizing_change_places(name: str, method: str) -> None:
    """The converter reorders the rows of Llama's query and key projections; a plan on the folder stays valid."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    grid = gguf_grid(name)
    guarded = guard_weight(normal(32, 256), grid, get_defense(method), seed=0, name="w", hessian=hessian(256))
    assert torch.equal(grid.quantize(guarded.weight[order]), guarded.codes[order])
    assert blocks_digest(grid.stored(guarded.weight[order]), grid.block_type, 32) == guarded.digest


class TestRefusals:
    def test_columns_that_fill_no_block(self) -> None:
        with pytest.raises(UnguardableError, match="in_features=320, block_size=256"):
            guard_weight(normal(8, 320), gguf_grid("Q4_K"), get_defense("stochastic"), seed=0, name="w")

    @pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, name: str, bad: float) -> None:
        weight = normal(8, 256)
        weight[2, 3] = bad
        with pytest.raises(UnguardableError, match="NaN or infinity"):
            guard_weight(weight, gguf_grid(name), get_defense("stochastic"), seed=0, name="w")

    def test_an_attack_hidden_beside_outliers(self) -> None:
        """Sub-blocks beside one that is 50 times larger are stored as zero, whatever is written into them."""
        weight = normal(8, 256)
        weight[:, :16] *= 50
        with pytest.raises(UnguardableError, match="stores as a single value"):
            guard_weight(weight, gguf_grid("Q2_K"), get_defense("stochastic"), seed=0, name="w")

    def test_too_few_codes_land(self) -> None:
        grid = gguf_grid("Q3_K")
        grid.min_as_planned = 1.0
        with pytest.raises(
            UnguardableError, match=r"of its codes are stored as chosen on gguf:Q3_K, 100\.00% are wanted"
        ):
            guard_weight(normal(128, 512), grid, get_defense("stochastic"), seed=0, name="w")

    def test_a_library_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "libnothing.so").write_bytes(b"no library")
        with pytest.raises(UsageError, match="not a shared library with ggml_quantize_chunk"):
            load_library(tmp_path / "libnothing.so")

    def test_no_library_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qcbguard_plugins.backends.ggml.library._PACKAGES", {})
        load_library.cache_clear()
        checked_quantizer.cache_clear()
        try:
            with pytest.raises(MissingDependencyError, match=r"qcbguard-plugins\[gguf\]"):
                gguf_grid("Q4_K")
            assert gguf_grid("Q4_0").quantize(normal(4, 64)).shape == (4, 64)
        finally:
            load_library.cache_clear()
            checked_quantizer.cache_clear()

    def test_a_type_that_cannot_be_guarded(self) -> None:
        with pytest.raises(UsageError, match="gguf:IQ2_XXS is no type"):
            gguf_grid("IQ2_XXS")
