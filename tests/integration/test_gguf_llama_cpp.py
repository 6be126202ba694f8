"""GGUF files between the guard and llama.cpp's own tools, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from qcbguard_plugins.backends.ggml.dry_run import dry_run_types
from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.backends.ggml.recipes import RECIPES, predict_types, resolve_recipe
from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.pipeline.gguf_guard import guard_gguf
from qcbguard_plugins.pipeline.gguf_plan import make_gguf_plan, model_shape
from qcbguard_plugins.pipeline.verify import verify
from tests.helpers.gguf_files import QUANTIZE, needs_llama_cpp, normal, write_imatrix, write_model
from tests.helpers.llama_cpp import GUARD, OPTIONS, PROVEN, quantize

pytestmark = needs_llama_cpp


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", num_layers=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: write_model(path, num_layers=9, tied=False),
        lambda path: write_model(path, num_layers=17),
        lambda path: write_model(path, num_layers=3, hidden=320, ffn=96),
        lambda path: write_model(path, num_layers=2, num_experts=8),
        lambda path: write_model(path, num_layers=2, num_experts=4),
    ],
    ids=["9-layers", "tied", "odd-widths", "8-experts", "4-experts"],
)
def test_types_are_predicted_as_llama_quantize_chooses_them(make: Callable[[Path], Path], tmp_path: Path) -> None:
    file = open_gguf(make(tmp_path / "model.gguf"))
    shapes = [(tensor.name, tensor.shape) for tensor in file.tensors.values()]
    for name in RECIPES:
        types, version = dry_run_types(QUANTIZE, file.path, name, GgufOptions())
        predicted = predict_types(shapes, resolve_recipe(name), model_shape(file))
        assert {k: v for k, v in predicted.items() if v != "F16"} == {k: v for k, v in types.items() if v != "F16"}
        assert "commit" in version


class TestGgufFile:
    @pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
    @pytest.mark.parametrize("recipe", PROVEN)
    def test_what_llama_quantize_stores_is_the_plan(self, recipe: str, type_name: str, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", type_name=type_name)
        target = tmp_path / "guarded.gguf"
        report = guard_gguf(source, target, recipe, GUARD, options=OPTIONS)
        before, after = open_gguf(source), open_gguf(target)
        assert {k: v for k, v in after.metadata.items() if k != GGUF_PROVENANCE_KEY} == before.metadata
        assert [(t.name, t.type_name, t.shape) for t in before.tensors.values()] == [
            (t.name, t.type_name, t.shape) for t in after.tensors.values()
        ]
        targets = {record.name for record in report.tensors}
        for name in before.tensors:
            assert bool((before.read_bytes(name) == after.read_bytes(name)).all()) == (name not in targets)
        verdict = verify(quantize(target, recipe))
        assert verdict.clean and verdict.num_tensors_as_planned == len(targets) == 8
        assert (report.share_as_planned or 0) >= 0.99
        assert "--dry-run, version" in report.toolchain["types_from"]

    def test_guarding_again_replaces_the_provenance(self, model: Path, tmp_path: Path) -> None:
        guard_gguf(model, tmp_path / "once.gguf", "Q4_0", GUARD, options=OPTIONS)
        guard_gguf(tmp_path / "once.gguf", tmp_path / "twice.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        assert verify(quantize(tmp_path / "twice.gguf", "Q4_K_M")).formats == ("gguf:Q4_K_M",)

    def test_stacked_experts(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", num_experts=4)
        report = guard_gguf(source, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        assert {record.shape for record in report.tensors if "exps" in record.name} == {(2048, 256), (1024, 512)}
        assert verify(quantize(tmp_path / "guarded.gguf", "Q4_K_M")).clean

    def test_rows_that_256_does_not_divide_are_guarded_on_the_fallback(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", hidden=320, ffn=96)
        report = guard_gguf(source, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        assert {",".join(record.formats) for record in report.tensors} == {"gguf:Q5_0", "gguf:Q8_0"}
        assert verify(quantize(tmp_path / "guarded.gguf", "Q4_K_M")).clean

    def test_the_users_own_flags(self, model: Path, tmp_path: Path) -> None:
        flags = ("--tensor-type", "attn_q=q5_1", "--output-tensor-type", "q8_0")
        options = GgufOptions(quantize_path=QUANTIZE, quantize_args=flags)
        report = guard_gguf(model, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=options)
        types = {record.name: ",".join(record.formats) for record in report.tensors}
        assert types["blk.0.attn_q.weight"] == "gguf:Q5_1"
        assert verify(quantize(tmp_path / "guarded.gguf", "Q4_K_M", *flags)).clean
        assert not verify(quantize(tmp_path / "guarded.gguf", "Q4_K_M")).clean
        unknown = GgufOptions(quantize_path=QUANTIZE, quantize_args=("--tensor-type", "attn_q=iq3_s"))
        with pytest.raises(UnguardableError, match=r"attn_q\.weight  IQ3_S"):
            make_gguf_plan(model, "Q4_K_M", unknown)

    def test_ignored_tensors_are_listed_and_left_alone(self, model: Path, tmp_path: Path) -> None:
        report = guard_gguf(model, tmp_path / "g.gguf", "Q4_K_M", GUARD, options=OPTIONS, ignore=["blk.0.*"])
        assert len(report.unguarded) == 7
        verdict = verify(quantize(tmp_path / "g.gguf", "Q4_K_M"))
        assert verdict.clean and len(verdict.unguarded) == 7

    def test_a_file_larger_than_memory_is_streamed(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", num_layers=40, ffn=2048)
        code = f"""
            import resource, torch
            from qcbguard_plugins.pipeline.gguf_guard import guard_gguf
            from qcbguard_plugins.backends.ggml.library import load_library
            load_library()
            torch.randn(64, 64) @ torch.randn(64, 64)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            guard_gguf({str(source)!r}, {str(tmp_path / "guarded.gguf")!r}, "Q4_0")
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
        )
        assert source.stat().st_size > 250 << 20
        assert int(result.stdout) << 10 < 120 << 20


class TestVerifyFindsOut:
    @pytest.fixture
    def guarded(self, model: Path, tmp_path: Path) -> Path:
        guard_gguf(model, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        return tmp_path / "guarded.gguf"

    def test_the_wrong_file(self, guarded: Path, model: Path) -> None:
        verdict = verify(quantize(model, "Q4_K_M"), plan=guarded)
        assert verdict.num_tensors_as_planned == 0
        assert {tensor.reason for tensor in verdict.tensors} == {"other codes than planned"}

    def test_another_type(self, guarded: Path) -> None:
        verdict = verify(quantize(guarded, "Q5_K_M"))
        assert "stored as Q5_K, planned as Q4_K" in {tensor.reason for tensor in verdict.tensors}

    def test_an_importance_matrix_that_was_not_planned(self, model: Path, tmp_path: Path) -> None:
        # Q5_K, because grid points of many types are found again whatever weighs them: such a file is as planned.
        guard_gguf(model, tmp_path / "guarded.gguf", "Q5_K_S", GUARD, options=OPTIONS)
        names = [f"blk.{i}.attn_{part}.weight" for i in range(2) for part in ("q", "k", "v", "output")]
        columns = {name: normal(256, seed=i, std=1.0).abs() ** 4 + 1e-3 for i, name in enumerate(names)}
        matrix = write_imatrix(tmp_path / "i.gguf", columns)
        verdict = verify(quantize(tmp_path / "guarded.gguf", "Q5_K_S", "--imatrix", str(matrix)))
        failed = [tensor for tensor in verdict.tensors if not tensor.as_planned]
        assert failed and {tensor.name for tensor in failed} <= set(names)
        assert all("i.gguf, and planned without one" in tensor.reason for tensor in failed)

    def test_with_the_importance_matrix_of_the_plan_and_with_another(self, model: Path, tmp_path: Path) -> None:
        names = [name for name in open_gguf(model).tensors if "blk" in name and "norm" not in name]
        width = {name: 512 if "down" in name else 256 for name in names}
        planned, other = (
            write_imatrix(
                tmp_path / f"{seed}.gguf", {n: normal(width[n], seed=seed, std=1.0).abs() + 0.01 for n in names}
            )
            for seed in (1, 2)
        )
        options = GgufOptions(quantize_path=QUANTIZE, imatrix_path=planned)
        guarded = tmp_path / "guarded.gguf"
        report = guard_gguf(model, guarded, "Q4_K_M", GUARD, options=options)
        assert report.toolchain["imatrix_sha256"]
        assert verify(quantize(guarded, "Q4_K_M", "--imatrix", str(planned))).clean
        assert not verify(quantize(guarded, "Q4_K_M", "--imatrix", str(other))).clean
        missing = verify(quantize(guarded, "Q4_K_M"))
        assert any("without an importance matrix, and planned with one" in tensor.reason for tensor in missing.tensors)


class TestCommandLine:
    def test_gguf_and_verify(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = str(tmp_path / "guarded.gguf")
        assert main(["gguf", str(model), target, "--for", "Q4_K_M", "--llama-quantize", str(QUANTIZE)]) == 0
        assert "15 of 15 target tensors guarded for gguf:Q4_K_M" in capsys.readouterr().out
        assert main(["verify", str(quantize(Path(target), "Q4_K_M"))]) == 0
        assert "15 of 15 guarded tensors" in capsys.readouterr().out
        assert main(["verify", str(quantize(model, "Q4_K_M")), "--plan", target]) == 1
        assert "DIFFERS" in capsys.readouterr().out
        assert main(["gguf", str(model), target, "--for", "Q4_K_M"]) == 2
        assert main(["gguf", str(model), str(tmp_path / "x"), "--for", "Q4_K_M", "--ignore", "blk.0.*"]) == 3


@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_a_dry_run_names_every_tensors_type_and_writes_nothing(
    type_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.gguf", type_name=type_name)
    arguments = ["gguf", str(model), "--for", "Q4_K_M", "--llama-quantize", str(QUANTIZE), "--ignore", "*attn_q*"]
    assert main([*arguments, "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    stored = {name: f"gguf:{t.type_name}" for name, t in open_gguf(quantize(model, "Q4_K_M")).tensors.items()}
    by_name = {tensor["name"]: tensor for tensor in plan["tensors"]}
    assert by_name.pop("blk.0.attn_q.weight")["action"] == "ignore"
    assert {name: tensor["formats"] for name, tensor in by_name.items()} == {name: [stored[name]] for name in by_name}
    dtype = {"F32": "float32", "F16": "float16"}[type_name]
    assert {tensor["dtype"] for tensor in by_name.values()} == {dtype}
    assert by_name["blk.0.ffn_down.weight"]["shape"] == [256, 512]
    assert plan["peak_bytes"] > 50 << 20 and plan["estimated_s"] > 0
    assert "--dry-run, version" in plan["types_from"]
    assert main([*arguments, "--dry-run", "--max-memory", "1MiB"]) == 2
    assert main(arguments) == 4
    assert "OUT is missing" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model-Q4_K_M0.gguf", "model.gguf"]


def test_nothing_of_ours_is_left_in_temporary_folders(model: Path, tmp_path: Path) -> None:
    guard_gguf(model, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=OPTIONS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["guarded.gguf", "model.gguf"]
