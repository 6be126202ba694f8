"""GGUF files that are broken, hostile, or not what the user meant: each a clear error, and nothing written."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.errors import CheckpointError, TargetExistsError, UnguardableError, UsageError
from qcbguard_plugins.pipeline.gguf_guard import guard_gguf
from qcbguard_plugins.pipeline.gguf_plan import make_gguf_plan
from qcbguard_plugins.pipeline.verify import verify
from tests.helpers.gguf_files import string, write_imatrix, write_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def refused(tmp_path: Path, content: bytes, reason: str) -> None:
    source, target = tmp_path / "bad.gguf", tmp_path / "out.gguf"
    source.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        guard_gguf(source, target, "Q4_0")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.gguf"]


def header(num_tensors: int = 0, num_metadata: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_metadata)


def one_tensor(shape: tuple[int, ...] = (32, 4), number: int = 0, offset: int = 0, name: str = "a.weight") -> bytes:
    """A file with one tensor of the given number of ggml dimensions, type and offset, and 512 bytes behind it."""
    info = string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
    content = header(1) + info
    return content.ljust(-(-len(content) // 32) * 32, b"\0") + bytes(512)


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty or malformed"),
    "wrong-magic": (b"GGML" + bytes(60), "does not start with 'GGUF'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version-1": (header(version=1), "version 1"),
    "version-9": (header(version=9), "version 9"),
    "cut-in-magic": (b"GG", "cut short: it ends inside its magic number"),
    "cut-in-counts": (header()[:12], "cut short: it ends inside its number of tensors"),
    "cut-in-metadata": (header(0, 1) + string("general.name"), "cut short: it ends inside general.name"),
    "huge-key": (header(0, 1) + struct.pack("<Q", 2**60), "cut short: it ends inside a metadata key"),
    "huge-count-of-metadata": (header(0, 2**60), "cut short"),
    "huge-count-of-tensors": (header(2**60), "cut short"),
    "huge-array": (header(0, 1) + string("k") + struct.pack("<IIQ", 9, 4, 2**61), "cut short: it ends inside k"),
    "unknown-metadata-type": (header(0, 1) + string("k") + struct.pack("<I", 77), "unknown type 77"),
    "nested-arrays": (
        header(0, 1) + string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,
        "unknown type 9",
    ),
    "metadata-twice": (header(0, 2) + 2 * (string("k") + struct.pack("<IB", 0, 1)), "appears twice"),
    "bad-alignment": (header(0, 1) + string("general.alignment") + struct.pack("<II", 4, 3), "not a multiple of 8"),
    "no-dimensions": (one_tensor(()), "has 0 dimensions"),
    "nine-dimensions": (one_tensor((1,) * 9), "has 9 dimensions"),
    "zero-rows": (one_tensor((32, 0)), "cannot be stored"),
    "unknown-type": (one_tensor(number=200), "unknown type 200"),
    "misaligned": (one_tensor(offset=5), "not aligned"),
    "past-the-end": (one_tensor((32, 400)), "cut short: .* bytes of a.weight are missing"),
    "overflow": (one_tensor((2**62, 2**62)), "cut short"),
    "ragged-blocks": (one_tensor((33, 4), number=2), "cannot be stored as Q4_0"),
    "quantized-already": (one_tensor((32, 4), number=2), "quantized already, 1 of its 1 tensors"),
    "no-architecture": (one_tensor(), "does not say its architecture"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_file_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    refused(tmp_path, *CASES[case])


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_download_is_refused(share: float, good: bytes, tmp_path: Path) -> None:
    refused(tmp_path, good[: int(share * len(good))], "cut short")


def test_tensors_that_overlap(tmp_path: Path) -> None:
    infos = [string(name) + struct.pack("<IQQIQ", 2, 32, 4, 0, offset) for name, offset in (("a", 0), ("b", 32))]
    content = header(2) + b"".join(infos)
    refused(tmp_path, content.ljust(-(-len(content) // 32) * 32, b"\0") + bytes(2048), "overlap")


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_any_flipped_byte_of_a_header_is_read_or_refused(position: int, good: bytes, tmp_path: Path) -> None:
    source = tmp_path / "flipped.gguf"
    content = bytearray(good)
    content[position] ^= 0xFF
    source.write_bytes(content)
    # Anything but an error of ours, which names the file, would fail the test.
    with contextlib.suppress(CheckpointError):
        open_gguf(source)


class TestNothingIsOverwritten:
    def test_output_equal_to_input(self, good: bytes, tmp_path: Path) -> None:
        source = tmp_path / "model.gguf"
        source.write_bytes(good)
        (tmp_path / "alias.gguf").symlink_to(source)
        for target in (source, tmp_path / "alias.gguf"):
            with pytest.raises(UsageError, match="is the file that is read"):
                guard_gguf(source, target, "Q4_0")
        assert source.read_bytes() == good

    def test_output_that_exists(self, good: bytes, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(good)
        (tmp_path / "out.gguf").write_text("mine")
        with pytest.raises(TargetExistsError, match="exists already"):
            guard_gguf(tmp_path / "model.gguf", tmp_path / "out.gguf", "Q4_0")
        assert (tmp_path / "out.gguf").read_text() == "mine"

    def test_a_run_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf")
        content = bytearray(source.read_bytes())
        begin = open_gguf(source).tensors["blk.0.ffn_down.weight"].begin
        content[begin : begin + 4] = struct.pack("<f", float("nan"))
        source.write_bytes(content)
        with pytest.raises(UnguardableError, match=r"blk\.0\.ffn_down\.weight.*NaN"):
            guard_gguf(source, tmp_path / "out.gguf", "Q4_0")
        assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


class TestWhatTheUserAskedFor:
    @pytest.fixture
    def model(self, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PATH", "")
        (tmp_path / "model.gguf").write_bytes(good)
        return tmp_path / "model.gguf"

    def test_an_unknown_recipe(self, model: Path) -> None:
        with pytest.raises(UsageError, match="gguf:Q9_X is no recipe"):
            make_gguf_plan(model, "Q9_X")

    def test_a_method_that_needs_a_forward_pass(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="qcbguard guard MODEL --for gguf:TYPE"):
            guard_gguf(model, tmp_path / "out.gguf", "Q4_0", "feedback")

    def test_a_pattern_that_matches_nothing(self, model: Path) -> None:
        with pytest.raises(UsageError, match="matches none"):
            make_gguf_plan(model, "Q4_0", ignore=["blk.7.*"])

    def test_flags_without_the_binary(self, model: Path) -> None:
        with pytest.raises(UsageError, match="need llama-quantize, and none was found"):
            make_gguf_plan(model, "Q4_0", GgufOptions(quantize_args=("--pure",)))

    @pytest.mark.parametrize("flag", ["--prune-layers", "--imatrix", "--include-weights"])
    def test_flags_that_a_plan_cannot_follow(self, flag: str) -> None:
        with pytest.raises(UsageError, match=f"cannot follow: {flag}"):
            GgufOptions(quantize_args=(flag, "x"))

    def test_a_binary_that_is_none(self, model: Path, tmp_path: Path) -> None:
        fake = tmp_path / "llama-quantize"
        fake.write_text("#!/bin/sh\necho no such option\nexit 1\n")
        fake.chmod(0o755)
        with pytest.raises(UsageError, match=r"does not say which types it will use \(exit code 1\)"):
            make_gguf_plan(model, "Q4_0", GgufOptions(quantize_path=fake))

    @pytest.mark.parametrize(
        "make", [lambda path: path.write_bytes(b"\x05\0\0\0old"), lambda path: None], ids=["old", "none"]
    )
    def test_an_importance_matrix_that_is_none(
        self, make: Callable[[Path], object], model: Path, tmp_path: Path
    ) -> None:
        make(tmp_path / "imatrix.dat")
        with pytest.raises(CheckpointError, match=r"imatrix\.dat"):
            make_gguf_plan(model, "Q4_K_M", GgufOptions(imatrix_path=tmp_path / "imatrix.dat"))

    def test_an_importance_matrix_of_another_model(self, model: Path, tmp_path: Path) -> None:
        other = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": torch.ones(64)})
        with pytest.raises(CheckpointError, match="made from another model"):
            guard_gguf(model, tmp_path / "out.gguf", "Q4_K_M", options=GgufOptions(imatrix_path=other))

    def test_verify_without_a_plan(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is not quantized"):
            verify(model)
        quantized = tmp_path / "quantized.gguf"
        quantized.write_bytes(one_tensor((32, 4), number=2))
        with pytest.raises(CheckpointError, match=GGUF_PROVENANCE_KEY):
            verify(quantized)

    def test_one_part_of_several(self, tmp_path: Path) -> None:
        content = header(1, 1) + string("split.count") + struct.pack("<IH", 2, 3)
        content += string("a.weight") + struct.pack("<IQQIQ", 2, 32, 4, 0, 0)
        refused(tmp_path, content.ljust(-(-len(content) // 32) * 32, b"\0") + bytes(512), "one part of 3")
