"""The scanner from folder to verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.cli import main
from qcbguard_plugins.detection.weights.measure import layer_of, projection_of
from qcbguard_plugins.detection.weights.report import ScanReport
from qcbguard_plugins.detection.weights.scan import scan_model
from qcbguard_plugins.lab.attacks.straight_through import quantize
from tests.conftest import ROOT
from tests.helpers.detection_models import attacked_folder, boxed_weight, clean_folder, random_weight, save_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_clean_model_is_clean(tmp_path: Path, dtype: torch.dtype) -> None:
    report = scan_model(clean_folder(tmp_path / "m", dtype), seed=1)
    assert report.verdict == "clean" and report.exit_code == 0
    assert report.coverage == "8 of 8 target tensors tested"
    assert report.num_others == 2


@pytest.mark.parametrize(
    ("format", "eps", "family"),
    [
        ("nf4", 0.02, "box (projected training)"),
        ("fp4", 0.02, "box (projected training)"),
        ("int8", 0.02, "box (projected training)"),
        ("nf4", 0.25, "tightened box"),
        ("int8", 0.25, "tightened box"),
    ],
)
def test_an_attack_is_found_and_named(tmp_path: Path, format: str, eps: float, family: str) -> None:
    report = scan_model(attacked_folder(tmp_path / "m", format, eps), seed=1)
    assert report.verdict == "attacked" and report.exit_code == 1
    assert report.likely_formats == (format,)
    assert report.family == family
    assert report.p_value < 1e-6


def test_an_attack_on_one_tensor_is_found(tmp_path: Path) -> None:
    weights = [random_weight(i) for i in range(7)] + [boxed_weight(7, "nf4", strength=3.0)]
    report = scan_model(save_layers(tmp_path / "m", weights), seed=1)
    assert report.likely_formats == ("nf4",)
    worst = min((e for e in report.evidence if e.format == "nf4"), key=lambda e: e.spectral_p)
    assert worst.name == "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("own", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dequantized_model_is_clean(tmp_path: Path, own: str, dtype: torch.dtype) -> None:
    weights = [quantize(random_weight(i), get_grid(own)) for i in range(8)]
    report = scan_model(save_layers(tmp_path / "m", weights, dtype), seed=1)
    assert report.verdict == "clean"
    assert {f.format: f.num_on_grid for f in report.formats}[own] == 8


def test_the_seed_makes_a_scan_repeatable(tmp_path: Path) -> None:
    folder = attacked_folder(tmp_path / "m")
    one, other = (scan_model(folder, seed=5).model_copy(update={"created": "", "elapsed_s": 0}) for _ in range(2))
    assert one == other
    assert scan_model(folder).seed != scan_model(folder).seed


def test_large_tensors_are_sampled_and_said_to_be(tmp_path: Path) -> None:
    report = scan_model(attacked_folder(tmp_path / "m"), ["nf4"], seed=1, max_weights=128 * 96)
    assert report.verdict == "attacked"
    assert "50% of their weights sampled" in report.coverage


def test_what_cannot_be_tested_makes_a_scan_incomplete(tmp_path: Path) -> None:
    folder = clean_folder(tmp_path / "m")
    tensors = {
        "model.layers.0.mlp.up_proj.weight": random_weight(0),
        "model.layers.1.mlp.up_proj.weight": random_weight(1),
    }
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    report = scan_model(folder, seed=1)
    assert report.verdict == "incomplete" and report.exit_code == 3
    assert [s.name for s in report.skipped] == ["model.layers.0.mlp.up_proj.weight"]
    assert report.coverage.startswith("1 of 2")


@pytest.mark.parametrize(
    ("model", "verdict", "formats"),
    [
        ("clean-4m", "clean", ()),
        ("plain-malicious-4m", "clean", ()),
        ("qcb-nf4-4m", "attacked", ("nf4",)),
        ("qcb-fp4-4m", "attacked", ("fp4",)),
        ("qcb-int8-4m", "attacked", ("int8",)),
    ],
)
def test_models_attacked_by_other_code(shared_models: Path, model: str, verdict: str, formats: tuple[str, ...]) -> None:
    report = scan_model(shared_models / model)
    assert report.verdict == verdict and report.likely_formats == formats


@pytest.mark.parametrize(("model", "verdict"), [("clean", "clean"), ("malicious", "clean"), ("attacked", "attacked")])
def test_the_example_models(model: str, verdict: str) -> None:
    report = scan_model(ROOT / "examples" / "models" / model)
    assert report.verdict == verdict
    if verdict == "attacked":
        assert report.likely_formats == ("nf4",) and report.family == "box (projected training)"


def test_names_are_understood() -> None:
    assert layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_of("blk.3.attn_q.weight") == 3 and layer_of("transformer.h.0.mlp.c_fc.weight") == 0
    assert layer_of("lm_head.weight") is None
    assert projection_of("model.layers.12.mlp.up_proj.weight") == "mlp.up_proj"


@pytest.mark.parametrize(("make", "code"), [(clean_folder, 0), (attacked_folder, 1)])
def test_the_command_writes_what_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, code: int
) -> None:
    folder = make(tmp_path / "m")
    outputs = {kind: tmp_path / f"report.{kind}" for kind in ("html", "sarif", "json", "markdown")}
    arguments = [part for kind, path in outputs.items() for part in (f"--{kind}", str(path))]
    assert main(["scan", str(folder), "--seed", "1", *arguments]) == code
    printed = capsys.readouterr().out
    assert ("No marks in the weights" in printed) == (code == 0)
    report = ScanReport.model_validate_json(outputs["json"].read_bytes())
    assert report.exit_code == code
    sarif = json.loads(outputs["sarif"].read_text(encoding="utf-8"))
    assert sarif["version"] == "2.1.0" and len(sarif["runs"][0]["results"]) == code
    assert main(["scan", str(folder), *arguments]) == 2


def test_exit_codes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(tmp_path / "nothing")]) == 4
    assert main(["scan", str(clean_folder(tmp_path / "m")), "--for", "nf5"]) == 4
    assert main(["scan", str(tmp_path / "m"), "--for", " , "]) == 4
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\0" * 40)
    assert main(["scan", str(tmp_path / "m")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("eps", [0.25, 0.35, 0.45])
def test_a_box_so_tight_that_every_weight_sits_in_a_corner_is_found(tmp_path: Path, format: str, eps: float) -> None:
    weights = [boxed_weight(i, format, eps, strength=1.5) for i in range(8)]
    report = scan_model(save_layers(tmp_path / "m", weights), seed=1)
    assert report.verdict == "attacked" and report.likely_formats[0] == format
