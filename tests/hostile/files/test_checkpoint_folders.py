"""Folders that are no checkpoint, or a hostile one: a clear error, and nothing else."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qcbguard_plugins import Guard, Stochastic
from qcbguard_plugins.checkpoint import open_checkpoint
from qcbguard_plugins.errors import CheckpointError, QcbguardError
from qcbguard_plugins.pipeline.guard import guard_planned
from qcbguard_plugins.pipeline.plan import make_plan


def shard(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no JSON": shard(b"{nope"),
    "header longer than the file": shard({"a": TENSOR}, length=1 << 20),
    "header of a terabyte": shard({"a": TENSOR}, length=1 << 40),
    "header of 2^64 - 1 bytes": shard({"a": TENSOR}, length=(1 << 64) - 1),
    "truncated data": shard({"a": TENSOR}, b"\0" * 8),
    "data after the last tensor": shard({"a": TENSOR}, b"\0" * 24),
    "overlapping tensors": shard({"a": TENSOR, "b": TENSOR}, b"\0" * 16),
    "a hole": shard({"a": TENSOR, "b": {**TENSOR, "data_offsets": [24, 40]}}, b"\0" * 40),
    "offsets backwards": shard({"a": {**TENSOR, "data_offsets": [16, 0]}}, b"\0" * 16),
    "negative offsets": shard({"a": {**TENSOR, "data_offsets": [-16, 0]}}, b"\0" * 16),
    "shape and size differ": shard({"a": {**TENSOR, "shape": [3, 2]}}, b"\0" * 16),
    "shape overflows": shard({"a": {**TENSOR, "shape": [1 << 62, 1 << 62]}}, b"\0" * 16),
    "unknown dtype": shard({"a": {**TENSOR, "dtype": "F33"}}, b"\0" * 16),
    "a list": shard([1, 2]),
    "no shape": shard({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, b"\0" * 16),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.",
    "a zip": b"PK\x03\x04" + b"\0" * 60,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_shard(name: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(MALFORMED[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_for_a_shard(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with contextlib.suppress(CheckpointError):
        open_checkpoint(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), value=st.integers(0, 255))
def test_any_byte_of_the_header_changed(position: float, value: int, llama: Path, folder: Path) -> None:
    content = bytearray((llama / "model.safetensors").read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[int(position * (length - 1))] = value
    (folder / "model.safetensors").write_bytes(content)
    with contextlib.suppress(QcbguardError):
        make_plan(folder, "nf4")


JSON_PROBLEMS = {"empty": "", "cut": '{"a":', "a list": "[]", "a number": "3", "deep": "[" * 100_000}


@pytest.mark.parametrize("name", JSON_PROBLEMS)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_malformed_json(file: str, name: str, folder: Path) -> None:
    (folder / file).write_text(JSON_PROBLEMS[name])
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "no-such-model"}, {"model_type": 3}, {"model_type": "llama", "hidden_size": "a"}]
)
def test_a_configuration_that_describes_no_model(config: dict[str, object], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        make_plan(folder, "nf4")


@pytest.mark.parametrize(
    "place",
    ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "x.bin", "a\\b.safetensors", 3, None],
)
def test_an_index_that_points_elsewhere(place: object, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    with pytest.raises(CheckpointError, match="not a safetensors file of the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_a_map(index: object, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(folder)


class TestShards:
    """An index and its shards that tell different stories."""

    def write(self, folder: Path, weight_map: dict[str, str], shards: dict[str, list[str]]) -> None:
        (folder / "model.safetensors").unlink()
        for name, keys in shards.items():
            save_file({key: torch.zeros(2) for key in keys}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def test_a_missing_shard(self, folder: Path) -> None:
        self.write(folder, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": ["a"]})
        with pytest.raises(CheckpointError, match=r"1 shards.*\n.*2\.safetensors"):
            open_checkpoint(folder)

    @pytest.mark.parametrize(
        ("weight_map", "shards", "reason"),
        [
            ({"a": "1.safetensors", "b": "1.safetensors"}, {"1.safetensors": ["a"]}, "not stored there"),
            ({"a": "1.safetensors"}, {"1.safetensors": ["a", "b"]}, "not listed"),
            (
                {"a": "1.safetensors", "b": "2.safetensors"},
                {"1.safetensors": ["b"], "2.safetensors": ["a"]},
                "listed in 1.safetensors and stored in 2.safetensors",
            ),
            (
                {"a": "1.safetensors", "b": "2.safetensors"},
                {"1.safetensors": ["a"], "2.safetensors": ["a", "b"]},
                "stored twice",
            ),
        ],
    )
    def test_a_disagreement(
        self, weight_map: dict[str, str], shards: dict[str, list[str]], reason: str, folder: Path
    ) -> None:
        self.write(folder, weight_map, shards)
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(folder)


def test_a_folder_of_pickles_is_refused_and_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(CheckpointError, match="a pickle, which is never opened"):
        open_checkpoint(folder)


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="not a folder"):
            open_checkpoint(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, {}, "awq"])
def test_a_quantized_checkpoint(quantization: object, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match="quantized already"):
        open_checkpoint(folder)


def save_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(KEY), "not stored as one tensor"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].double()}), "float64"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.float8_e4m3fn)}), "not full precision"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}), "not full precision"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].reshape(-1)}), "not a matrix"),
    ],
)
def test_targets_that_cannot_be_guarded_are_named(
    change: Callable[[dict[str, torch.Tensor]], object], reason: str, folder: Path
) -> None:
    save_changed(folder, change)
    with pytest.raises(QcbguardError, match=rf"(?s)1 tensors cannot be guarded.*q_proj.*{reason}.*--ignore"):
        make_plan(folder, "nf4")


def test_a_shard_that_shrinks_under_the_run(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, "nf4")
    source = folder / "model.safetensors"
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="became shorter"):
        guard_planned(plan, tmp_path / "out", Guard(Stochastic()))
    assert not (tmp_path / "out").exists()
