"""What the package itself keeps, damaged: a named error, or the work is done again. Found by fuzzing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcbguard_plugins import Guard, Stochastic, guard_checkpoint, verify_checkpoint
from qcbguard_plugins.backends.ggml.imatrix import read_imatrix
from qcbguard_plugins.backends.gptq.artifact import PackedFolder
from qcbguard_plugins.checkpoint import hash_file, partial_of
from qcbguard_plugins.detection.behaviour.prompts import gather_prompts
from qcbguard_plugins.errors import CalibrationError, CheckpointError, UsageError
from qcbguard_plugins.hooks.transformers.calibrated_cache import _digests, _open
from qcbguard_plugins.models.calibration import Calibration
from qcbguard_plugins.pipeline.plan import make_plan
from tests.helpers.gguf_files import write_imatrix

DAMAGED = ["", "{", "[" * 100_000, '"x"', "[1]", "null"]


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:5] or "empty")
def test_the_request_of_an_interrupted_run(text: str, llama: Path, tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "guarded")
    partial.mkdir()
    (partial / "request.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"request\.json is damaged(.|\n)*to begin anew"):
        guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], "stochastic")
    assert partial.exists()


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:5] or "empty")
def test_the_record_of_a_cache_entry(text: str, tmp_path: Path) -> None:
    (tmp_path / "guarded.json").write_text(text)
    with pytest.raises(CheckpointError, match="Delete that folder"):
        _open(tmp_path, Guard())


@pytest.mark.parametrize("text", [*DAMAGED, '{"a": 1}', '{"a": null}'], ids=lambda text: text[:5] or "empty")
def test_the_memo_of_digests_is_made_again(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "file-digests.json").write_text(text)
    assert _digests([file], tmp_path) == {file: hash_file(file)}


@pytest.mark.parametrize("dtype", ["float9", "nn", "int8", "Tensor", "__dict__"])
def test_a_manifest_with_no_dtype(dtype: str, llama: Path, tmp_path: Path) -> None:
    guarded = tmp_path / "guarded"
    guard_checkpoint(llama, guarded, ["nf4"], Guard(Stochastic(), seed=0))
    manifest = json.loads((guarded / "qcbguard.json").read_text())
    manifest["tensors"][0]["read_dtype"] = dtype
    (guarded / "qcbguard.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="read_dtype"):
        verify_checkpoint(guarded)


def test_a_configuration_that_breaks_in_the_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": -0.5, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        make_plan(folder, "nf4")


def test_a_configuration_of_more_layers_than_there_are_tensors(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="1000000000 layers"):
        make_plan(folder, "nf4")


def test_an_index_that_transformers_cannot_read(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(model_folder("llama-sharded"), tmp_path / "model")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(CheckpointError, match="transformers cannot load model: KeyError"):
        guard_checkpoint(source, tmp_path / "guarded", ["nf4"], "feedback")
    guard_checkpoint(source, tmp_path / "guarded", ["nf4"], "stochastic")


def test_a_group_size_without_end(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": float("inf")}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        PackedFolder(tmp_path)


def test_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "\\ud800", "prompt": "\\ud800"}\n')
    with pytest.raises(CalibrationError, match="line 1"):
        Calibration(texts=str(path)).describe()
    with pytest.raises(UsageError, match="line 1"):
        gather_prompts(path)


def test_sums_and_counts_of_an_importance_matrix_that_differ(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", {"a.weight": torch.ones(16)})
    content = path.read_bytes()
    # The dimensions of the counts, [1, 1]: five of them.
    name = content.index(b"a.weight.counts") + len(b"a.weight.counts")
    path.write_bytes(content[: name + 12] + (3).to_bytes(8, "little") + content[name + 20 :])
    with pytest.raises(CheckpointError, match="do not go together"):
        read_imatrix(path)
