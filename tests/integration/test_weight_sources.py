"""Which tensors a scan takes, and from which files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qcbguard_plugins.checkpoint.open_weights import open_weights
from qcbguard_plugins.checkpoint.weight_source import is_target
from qcbguard_plugins.cli.render.advice import headline
from qcbguard_plugins.cli.render.sarif import to_sarif
from qcbguard_plugins.cli.render.scan_html import render_html
from qcbguard_plugins.cli.render.scan_text import render_scan
from qcbguard_plugins.detection.weights.scan import scan_model
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.pipeline.plan import make_plan
from tests.conftest import SHAPES
from tests.helpers.detection_models import attacked_folder, random_weight


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "mixtral"])
def test_a_scan_takes_what_the_stock_quantizer_takes(model_folder: Callable[[str], Path], shape: str) -> None:
    plan = make_plan(model_folder(shape), "nf4")
    taken = {target.name: target for target in open_weights(model_folder(shape)).targets}
    assert set(taken) == {target.key for target in plan.targets}
    for target in plan.targets:
        assert taken[target.key].matrix_shape == target.shape
        assert taken[target.key].transposed == target.transposed


def test_experts_are_scanned(model_folder: Callable[[str], Path]) -> None:
    names = [target.name for target in open_weights(model_folder("mixtral")).targets]
    assert any("experts" in name for name in names)
    assert not any(name.endswith("gate.weight") for name in names), "a router is never quantized"


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("transformer.h.0.attn.c_attn.weight", True),
        ("bert.encoder.layer.0.attention.output.dense.weight", True),
        ("blk.0.attn_output.weight", True),
        ("blk.0.ffn_gate_exps.weight", True),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", True),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("transformer.wte.weight", False),
        ("output.weight", False),
        ("token_embd.weight", False),
        ("blk.0.ffn_gate_inp.weight", False),
        ("model.layers.0.block_sparse_moe.gate.weight", False),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("shared.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
    ],
)
def test_names(name: str, taken: bool) -> None:
    assert is_target(name, (64, 64)) == taken
    assert not is_target(name, (64,)) and not is_target(name, (0, 64))


def test_bigcode_keeps_its_linear_layers_as_they_are(tmp_path: Path) -> None:
    save_file({"transformer.h.0.mlp.c_fc.weight": random_weight(0, 256, 64)}, tmp_path / "model.safetensors")
    assert not open_weights(tmp_path / "model.safetensors").targets[0].transposed
    save_file({"transformer.h.0.mlp.c_fc.weight": random_weight(0, 64, 256)}, tmp_path / "conv.safetensors")
    assert open_weights(tmp_path / "conv.safetensors").targets[0].matrix_shape == (256, 64)


def test_a_single_file_is_scanned_like_its_folder(tmp_path: Path) -> None:
    folder = attacked_folder(tmp_path / "m")
    whole, alone = scan_model(folder, seed=1), scan_model(folder / "model.safetensors", seed=1)
    assert whole.formats == alone.formats and alone.model == "model.safetensors"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_gguf_files_are_scanned(tmp_path: Path, dtype: str) -> None:
    gguf = pytest.importorskip("gguf")
    weights = load_file(attacked_folder(tmp_path / "m") / "model.safetensors")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for i, (name, weight) in enumerate(weights.items()):
        if "layers" in name:
            kind = gguf.GGMLQuantizationType[dtype]
            data = weight.float().numpy() if dtype == "F32" else weight.numpy()
            if dtype == "BF16":
                data = gguf.quantize(weight.float().numpy(), kind)
            writer.add_tensor(f"blk.{i}.ffn_up.weight", data, raw_dtype=kind)
    writer.add_tensor("token_embd.weight", torch.zeros(64, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = scan_model(path, seed=1)
    assert report.file_kind == "gguf" and report.coverage == "8 of 8 target tensors tested"
    assert report.likely_formats == ("nf4",)
    assert {tensor.shape for tensor in report.tensors} == {(128, 192)}


def test_a_quantized_gguf_file_cannot_be_tested(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quantize(random_weight(0).numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = scan_model(tmp_path / "q.gguf")
    assert report.verdict == "incomplete" and report.skipped[0].name == "blk.0.ffn_up.weight"


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UsageError, match="neither"):
        open_weights(tmp_path / "model.bin")
    with pytest.raises(UsageError, match="does not exist"):
        open_weights(tmp_path / "missing")
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no matrix"):
        open_weights(tmp_path / "model.safetensors")


def test_matrices_of_a_remote_class_are_scanned_whatever_their_names(folder: Path) -> None:
    """A built-in model type does not help: with trust_remote_code the class of auto_map reads the checkpoint."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), "side.table": random_weight(3, 64, 96)}, path)
    assert "side.table" not in {target.name for target in open_weights(folder).targets}
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Side"}
    (folder / "config.json").write_text(json.dumps(config))
    targets = {target.name: target.matrix_shape for target in open_weights(folder).targets}
    assert targets["side.table"] == (64, 96) and "model.embed_tokens.weight" not in targets


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.safetensors", "sub/model.safetensors"])
def test_other_weight_files_are_named_and_make_a_scan_incomplete(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "clean"
    folder.mkdir()
    save_file({f"layers.{i}.up_proj.weight": random_weight(i) for i in range(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    assert scan_model(folder, seed=1).verdict == "clean"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"not even opened")
    report = scan_model(folder, seed=1)
    assert report.verdict == "incomplete" and report.exit_code == 3
    assert [file.name for file in report.untested_files] == [name]
    assert "1 other weight files of the folder were not tested" in headline(report)
    text = io.StringIO()
    Console(file=text, width=120).print(render_scan(report))
    assert name in text.getvalue() and name in json.dumps(to_sarif(report)) and name in render_html(report)
