"""Files that were made to hurt a scanner: each ends in a clear error or in a report, never in a traceback."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qcbguard_plugins.cli import main
from qcbguard_plugins.cli.render.scan_html import render_html
from qcbguard_plugins.cli.render.scan_text import render_markdown
from qcbguard_plugins.detection.weights.scan import scan_model
from qcbguard_plugins.errors import CheckpointError
from tests.helpers.detection_models import clean_folder, random_weight
from tests.hostile.files.test_gguf_files import CASES as GGUF_CASES

NAME = "model.layers.0.mlp.up_proj.weight"


def _raw(header: object, data: bytes = b"", num_header_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if num_header_bytes is None else num_header_bytes) + text + data


def _tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F16") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 2], "data_offsets": [begin, end]}


FILES = {
    "empty": b"",
    "no header": b"\0" * 8,
    "short length": b"\1\2\3",
    "header beyond the end": _raw({NAME: _tensor(0, 8)}, num_header_bytes=1 << 40),
    "header of every byte": _raw(b"", num_header_bytes=2**64 - 1),
    "truncated data": _raw({NAME: _tensor(0, 8192, [64, 64])}, b"\0" * 100),
    "overlapping": _raw({NAME: _tensor(0, 8192, [64, 64]), "b.weight": _tensor(4096, 12288, [64, 64])}, b"\0" * 12288),
    "negative offset": _raw({NAME: {"dtype": "F16", "shape": [4], "data_offsets": [-8, 0]}}, b"\0" * 8),
    "shape disagrees": _raw({NAME: _tensor(0, 8192, [64, 640])}, b"\0" * 8192),
    "shape overflows": _raw({NAME: _tensor(0, 0, [2**40, 2**40])}),
    "unknown dtype": _raw({NAME: _tensor(0, 8192, [64, 64], "F13")}, b"\0" * 8192),
    "not an object": _raw([1, 2]),
    "deep nesting": _raw(b"[" * 200_000),
    "not text": _raw(b"\xff\xfe" * 50),
    "a pickle": b"\x80\x04\x95" + b"\0" * 64,
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_malformed_files_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, form: str) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    file = tmp_path / "model.safetensors"
    file.write_bytes(FILES[kind])
    assert main(["scan", str(tmp_path if form == "folder" else file)]) == 2
    captured = capsys.readouterr()
    assert captured.err.strip().startswith("error: ") and "Traceback" not in captured.err
    assert "No marks in the weights" not in captured.out


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 7])
def test_an_index_cannot_point_outside(tmp_path: Path, place: object) -> None:
    folder = clean_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {NAME: place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a safetensors file of the folder"):
        scan_model(folder)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.full((64, 64), float("nan")), "NaN"),
        (torch.full((64, 64), float("inf")), "NaN"),
        (torch.ones(64, 64, dtype=torch.int8), "not full precision"),
        (torch.ones(64, 64).to(torch.float8_e4m3fn), "not full precision"),
        (torch.full((64, 64), 1e6), "overflow"),
        (torch.ones(17, 16), "too small"),
    ],
    ids=["nan", "inf", "int8", "float8", "huge", "small"],
)
def test_tensors_that_cannot_be_tested_are_named(tmp_path: Path, tensor: torch.Tensor, reason: str) -> None:
    save_file({NAME: tensor, "model.layers.1.mlp.up_proj.weight": random_weight(0)}, tmp_path / "model.safetensors")
    report = scan_model(tmp_path / "model.safetensors", seed=0)
    assert report.verdict == "incomplete"
    assert [s.name for s in report.skipped] == [NAME] and reason in report.skipped[0].reason


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64, 64), torch.ones(64, 64), torch.eye(64) * 1e-30, torch.full((64, 64), 1e-38), torch.eye(80)[:64]],
    ids=["zeros", "ones", "tiny diagonal", "subnormal", "identity"],
)
def test_degenerate_weights_are_no_attack(tmp_path: Path, weight: torch.Tensor) -> None:
    save_file({NAME: weight.contiguous()}, tmp_path / "model.safetensors")
    assert scan_model(tmp_path / "model.safetensors", seed=0).verdict == "clean"


def test_empty_tensors_are_no_targets(tmp_path: Path) -> None:
    save_file({NAME: torch.empty(0, 64), "a.weight": random_weight(0)}, tmp_path / "model.safetensors")
    report = scan_model(tmp_path / "model.safetensors", seed=0)
    assert report.num_targets == 1 and report.num_others == 1


def test_a_name_cannot_reach_the_page_or_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "<script>alert(1)</script>[red]\x1b[2J${\\frac}|`x`.layers.0.a.weight"
    save_file(
        {hostile: torch.full((64, 64), float("nan")), hostile + ".b.weight": random_weight(0)},
        tmp_path / "model.safetensors",
    )
    report = scan_model(tmp_path / "model.safetensors", seed=0)
    page = render_html(report)
    assert "<script" not in page and "\x1b" not in page
    assert main(["scan", str(tmp_path / "model.safetensors")]) == 3
    assert "\x1b" not in capsys.readouterr().out
    assert "<script" not in render_markdown(report)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_file_is_an_error_or_a_report(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes overwritten anywhere, and a cut anywhere: the scanner's own errors are the only ones."""
    file = tmp_path / "model.safetensors"
    if not file.exists():
        save_file({NAME: random_weight(0, 48, 64).half()}, tmp_path / "whole.safetensors")
    content = bytearray((tmp_path / "whole.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 200)))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        report = scan_model(file, ["nf4"], seed=0)
    except CheckpointError:
        return
    assert report.num_targets >= 1


@pytest.mark.parametrize("name", sorted(GGUF_CASES.keys() - {"quantized-already", "no-architecture"}))
def test_a_malformed_gguf_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """Counts are compared with the size of the file before anything is read by them."""
    content, reason = GGUF_CASES[name]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        scan_model(tmp_path / "model.gguf")
