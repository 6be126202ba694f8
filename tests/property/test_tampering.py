"""Whatever is changed in a guarded folder's weights or in a quantized file, verification finds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from qcbguard_plugins import Guard, Stochastic, guard_checkpoint, verify_checkpoint
from qcbguard_plugins.backends.ggml.artifact import stored_digest
from qcbguard_plugins.checkpoint import open_checkpoint
from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.pipeline.verify import verify
from tests.helpers.gguf_files import write_quantized
from tests.hostile.fuzz.gguf_targets import manifest_of

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture(scope="module")
def guarded(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded") / "folder"
    guard_checkpoint(model_folder("llama-sharded"), folder, ["nf4"], Guard(Stochastic(), seed=0))
    assert verify_checkpoint(folder).clean
    return folder


@SLOW
@given(data=st.data())
def test_a_changed_byte_of_a_weight_file(data: st.DataObject, guarded: Path) -> None:
    """In the header or behind it, in a guarded tensor or in one that is not."""
    shard = guarded / data.draw(st.sampled_from(open_checkpoint(guarded).shards))
    original = shard.read_bytes()
    place, value = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(original)
    changed[place] ^= value
    shard.write_bytes(changed)
    try:
        report = verify_checkpoint(guarded)
    except CheckpointError:
        return
    finally:
        shard.write_bytes(original)
    assert not report.clean and report.changed_files == (shard.name,)


@SLOW
@given(data=st.data())
def test_a_changed_code_even_where_the_manifest_is_changed_along(data: st.DataObject, guarded: Path) -> None:
    """An attacker who rewrites the file's hash too still has to make the stock quantizer store the planned codes."""
    report = verify_checkpoint(guarded)
    checkpoint = open_checkpoint(guarded)
    name = data.draw(st.sampled_from([tensor.name for tensor in report.tensors]))
    entry = checkpoint.tensors[name]
    shard = guarded / entry.shard
    original = shard.read_bytes()
    changed = bytearray(original)
    weight = data.draw(st.integers(0, entry.num_bytes // 2 - 1))
    changed[entry.begin + 2 * weight + 1] ^= 0x80  # the sign of a float16
    shard.write_bytes(changed)
    try:
        after = {tensor.name: tensor.as_planned for tensor in verify_checkpoint(guarded).tensors}
    finally:
        shard.write_bytes(original)
    is_zero = original[entry.begin + 2 * weight : entry.begin + 2 * weight + 2] in (b"\0\0", b"\0\x80")
    assert is_zero or not after[name]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "model.gguf"
    write_quantized(path, TYPES, {GGUF_PROVENANCE_KEY: "{}"})
    file = open_gguf(path)
    digests = {name: stored_digest(file, tensor) for name, tensor in file.tensors.items()}
    write_quantized(path, TYPES, {GGUF_PROVENANCE_KEY: manifest_of("gguf:Q4_0", digests, TYPES)})
    assert verify(path).clean
    return path


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_of_a_quantized_tensor(data: st.DataObject, quantized: Path) -> None:
    file = open_gguf(quantized)
    tensor = file.tensors[data.draw(st.sampled_from(sorted(file.tensors)))]
    place = tensor.begin + data.draw(st.integers(0, tensor.num_bytes - 1))
    original = quantized.read_bytes()
    changed = bytearray(original)
    changed[place] ^= data.draw(st.integers(1, 255))
    copy = quantized.with_name("changed.gguf")
    copy.write_bytes(changed)
    assert not verify(copy).clean


def test_tensors_that_change_places(tmp_path: Path) -> None:
    """Two tensors of one type and shape whose bytes are exchanged."""
    write_quantized(tmp_path / "twice.gguf", ["Q4_0", "Q4_0"], {GGUF_PROVENANCE_KEY: "{}"})
    file = open_gguf(tmp_path / "twice.gguf")
    digests = {name: stored_digest(file, tensor) for name, tensor in file.tensors.items()}
    path = write_quantized(
        tmp_path / "model.gguf",
        ["Q4_0", "Q4_0"],
        {GGUF_PROVENANCE_KEY: manifest_of("gguf:Q4_0", digests, ["Q4_0", "Q4_0"])},
    )
    file = open_gguf(path)
    content = bytearray(path.read_bytes())
    first, second = (content[t.begin : t.begin + t.num_bytes] for t in file.tensors.values())
    for tensor, other in zip(file.tensors.values(), (second, first), strict=True):
        content[tensor.begin : tensor.begin + tensor.num_bytes] = other
    path.write_bytes(content)
    assert verify(path).num_tensors_as_planned == 0
