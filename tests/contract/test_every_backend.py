"""What every backend must do; a new one is picked up by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.backends.formats import BACKENDS, backend_of, versions
from qcbguard_plugins.errors import CheckpointError, MissingDependencyError, UsageError
from qcbguard_plugins.models.skeleton import build_skeleton, load_config

pytestmark = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def open_and_find_plan(backend: Backend, path: Path) -> None:
    artifact = backend.open_artifact(path)
    assert artifact is not None
    artifact.find_plan(None)


def test_it_says_what_it_is(backend: Backend) -> None:
    assert BACKENDS[backend.name] is backend
    assert backend.formats and backend.packages
    assert all(len(summary) > 10 for summary in backend.formats.values())


def test_its_formats_lead_to_it_and_to_no_other(backend: Backend) -> None:
    for name in backend.formats:
        assert [other.name for other in BACKENDS.values() if other.takes(name)] == [backend.name]
        assert backend_of(name) is backend
        assert backend.representative_grid(name).num_levels >= 2


def test_an_unknown_format_of_its_spelling_is_an_error(backend: Backend) -> None:
    for name in backend.formats:
        wrong = f"{name}-nonsense"
        with pytest.raises(UsageError):
            backend_of(wrong).grid(wrong)


def test_a_missing_library_is_named_with_the_way_to_install_it(backend: Backend) -> None:
    missing = backend.missing(ImportError("no such module"))
    assert backend.name in missing.summary and "pip install" in missing.remedy
    assert backend.extra in missing.remedy


def test_its_targets_are_weights_of_the_model(backend: Backend, model_folder: Callable[[str], Path]) -> None:
    config = load_config(model_folder("llama-fp32"))
    skeleton = build_skeleton(config)
    parameters = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters(remove_duplicate=False)}
    for name in backend.formats:
        try:
            selection = backend.targets(copy.deepcopy(skeleton), name)
        except MissingDependencyError as error:
            pytest.skip(f"{backend.name} is not installed: {error.summary}")
        assert selection.targets
        for target in selection.targets.values():
            assert parameters[target.name] == target.stored_shape
            assert len(target.grids) == 1 and target.num_matrices == 1
            assert backend.takes(target.formats[0])


def test_what_it_stores_is_a_code_for_each_weight(backend: Backend) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    for name in backend.formats:
        grid = backend.representative_grid(name)
        codes = backend.stored_codes(weight, grid)
        assert codes.dtype == torch.uint8 and codes.shape == weight.shape
        assert int(codes.max()) < grid.num_levels
        assert torch.equal(backend.quick_codes(weight, grid), codes)
        digest = backend.stored_digest(weight, grid)
        assert digest == backend.stored_digest(weight.clone(), grid)
        assert digest != backend.stored_digest(weight.flip(1), grid)


def test_a_folder_that_it_did_not_write_is_no_artifact(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    assert backend.open_artifact(tmp_path) is None
    assert backend.open_artifact(tmp_path / "model.bin") is None
    assert backend.open_artifact(tmp_path / "nothing.txt") is None


def test_an_artifact_without_a_plan_is_an_error_with_a_way_out(backend: Backend, tmp_path: Path) -> None:
    for path in (tmp_path / "empty.gguf", tmp_path / "empty.onnx"):
        path.write_bytes(b"")
        if path.suffix == {"ggml": ".gguf", "onnx": ".onnx"}.get(backend.name):
            with pytest.raises(CheckpointError, match=rf"{path.name}|{tmp_path.name}"):
                open_and_find_plan(backend, path)
        else:
            assert backend.open_artifact(path) is None


def test_its_packages_are_in_the_versions(backend: Backend) -> None:
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    for package in backend.packages:
        assert versions().get(package) == installed.get(package)
