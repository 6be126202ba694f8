"""Manifests of older versions are read and verified for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qcbguard_plugins import verify
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, GuardReport, read_manifest, read_report
from qcbguard_plugins.errors import CheckpointError
from tests.conftest import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "manifest-1"


@pytest.mark.parametrize("name", ["nf4-int8", "openvino"])
def test_a_folder_of_the_first_schema_is_verified(name: str) -> None:
    stored = json.loads((FIXTURES / name / MANIFEST_FILE).read_text())
    assert stored["schema_version"] == 1
    report = verify(FIXTURES / name)
    assert report.clean and report.num_tensors_as_planned == len(stored["tensors"]) > 0
    assert report.formats == tuple(stored["format"].split(","))
    assert list(report.unguarded) == stored["unguarded"]


def test_what_the_first_schema_says_is_kept() -> None:
    stored = json.loads((FIXTURES / "openvino" / MANIFEST_FILE).read_text())
    report = read_manifest(FIXTURES / "openvino")
    assert report.schema_version == 2
    for old, new in zip(stored["tensors"], report.tensors, strict=True):
        assert new.formats == (old["format"] or stored["format"],)
        assert (new.num_as_planned, new.chosen) == (old["num_landed"], old["settled"])
        assert (new.name, new.shape, new.codes_sha256) == (old["name"], tuple(old["shape"]), old["codes_sha256"])
    assert GuardReport.model_validate_json(report.model_dump_json()) == report


def test_a_changed_weight_of_an_old_folder_is_found(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "nf4-int8", tmp_path / "folder"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-9000] ^= 0x40
    (folder / "model.safetensors").write_bytes(weights)
    report = verify(folder)
    assert report.changed_files == ("model.safetensors",) and not report.clean


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 3}', '{"format": 3}'])
def test_what_is_no_manifest_is_an_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="the text is not a valid manifest"):
        read_report(text, "the text")
