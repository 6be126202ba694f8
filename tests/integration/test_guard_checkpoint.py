"""A guarded folder takes the place of its source, and verify tells when it no longer does."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcbguard_plugins import (
    Calibration,
    Feedback,
    FlipGuard,
    Guard,
    Stochastic,
    guard_checkpoint,
    guard_model,
    verify_checkpoint,
)
from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint import hash_file, open_checkpoint
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, read_manifest
from qcbguard_plugins.defenses.dither_width import WIDTHS
from qcbguard_plugins.errors import CheckpointError, TargetExistsError, UnguardableError, UsageError, VerificationError
from qcbguard_plugins.pipeline.multi_format import errors_left
from tests.conftest import SHAPES

FEEDBACK = Guard(Feedback(), seed=1, calibration=Calibration(num_sequences=4, sequence_length=32))
GUARDS = {"stochastic": Guard(Stochastic(), seed=1), "feedback": FEEDBACK}


def header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8 + int.from_bytes(file.read(8), "little"))


@pytest.mark.parametrize("method", GUARDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_values_of_the_targets_change(
    shape: str, method: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = model_folder(shape), tmp_path / "guarded"
    report = guard_checkpoint(source, target, ["nf4"], GUARDS[method])
    assert {p.name for p in target.iterdir()} - {p.name for p in source.iterdir()} == {MANIFEST_FILE}
    before, after = open_checkpoint(source), open_checkpoint(target)
    assert before.tensors == after.tensors  # names, dtypes, shapes, shards and offsets
    guarded = {record.key for record in report.tensors}
    for key in before.tensors:
        assert torch.equal(before.read(key), after.read(key)) == (key not in guarded), key
    for file in source.iterdir():
        if file.name in before.shards:
            assert header_of(file)[8:] == header_of(target / file.name)[8:]
        else:
            assert file.read_bytes() == (target / file.name).read_bytes()


def test_the_manifest_tells_what_was_done(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "guarded"
    report = guard_checkpoint(llama, target, ["fp4"], FEEDBACK)
    assert read_manifest(target) == report
    (file,) = report.files
    assert file.sha256_in == hash_file(llama / file.name)
    assert file.sha256_out == hash_file(target / file.name)
    assert (report.method, report.parameters) == ("feedback", {"width": "auto", "draws": 8, "damp_percent": 0.1})
    assert all(record.chosen["width"] in WIDTHS for record in report.tensors)
    assert report.seed == 1
    assert report.calibration is not None
    assert report.calibration["num_sequences"] == 4
    assert {"torch", "transformers", "bitsandbytes", "python"} <= report.versions.keys()
    before = open_checkpoint(llama)
    for record in report.tensors:
        codes = stock_codes(before.read(record.key), get_grid("fp4"))
        planned = stock_codes(open_checkpoint(target).read(record.key), get_grid("fp4"))
        assert record.num_moved == int((codes != planned).sum())


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "nf4-b128"])
@pytest.mark.parametrize("shape", ["llama-bf16", "gpt2"])
def test_verify_finds_the_planned_codes(
    shape: str, name: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    guard_checkpoint(model_folder(shape), tmp_path / "guarded", [name], GUARDS["stochastic"])
    report = verify_checkpoint(tmp_path / "guarded")
    assert report.clean
    assert report.num_tensors_as_planned == len(report.tensors) > 0


def test_a_seed_is_drawn_and_recorded(llama: Path, tmp_path: Path) -> None:
    first = guard_checkpoint(llama, tmp_path / "a", ["nf4"], "stochastic")
    second = guard_checkpoint(llama, tmp_path / "b", ["nf4"], "stochastic")
    again = guard_checkpoint(llama, tmp_path / "c", ["nf4"], Guard(Stochastic(), seed=first.seed))
    assert first.seed != second.seed
    assert first.codes_sha256 == again.codes_sha256 != second.codes_sha256


def test_shards_change_nothing(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    sharded = model_folder("llama-sharded")
    assert len(open_checkpoint(sharded).shards) > 1
    AutoModelForCausalLM.from_pretrained(sharded).save_pretrained(tmp_path / "single")
    one = guard_checkpoint(sharded, tmp_path / "one", ["nf4"], GUARDS["stochastic"])
    other = guard_checkpoint(tmp_path / "single", tmp_path / "other", ["nf4"], GUARDS["stochastic"])
    assert one.codes_sha256 == other.codes_sha256


def test_a_model_in_memory_is_guarded_like_its_folder(llama: Path, tmp_path: Path) -> None:
    report = guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], FEEDBACK)
    model = AutoModelForCausalLM.from_pretrained(llama)
    made = guard_model(model, "nf4", FEEDBACK, tokenizer=AutoTokenizer.from_pretrained(llama))
    assert {r.name: r.codes_sha256 for r in made.tensors} == {r.name: r.codes_sha256 for r in report.tensors}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "guarded").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shape", ["llama-bf16", "llama-tied", "gpt2"])
def test_a_model_in_memory_leaves_a_manifest(shape: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(shape))
    made = guard_model(model, ["nf4"], GUARDS["stochastic"], ignore=["*.0.*"])
    assert made.unguarded and made.tensors
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    for folder in (tmp_path / "copy", tmp_path / "saved"):
        report = verify_checkpoint(folder)
        assert report.clean and report.num_tensors_as_planned == len(made.tensors)
        assert report.unguarded == made.unguarded


def test_a_model_that_changes_after_its_guard_is_found_out(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    guard_model(model, "nf4", GUARDS["stochastic"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01).add_(0.003)
    model.save_pretrained(tmp_path / "saved")
    report = verify_checkpoint(tmp_path / "saved")
    assert [tensor.name for tensor in report.tensors if not tensor.as_planned] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_coarser_dtype_in_the_configuration_is_planned_for(dtype: str, llama: Path, tmp_path: Path) -> None:
    """transformers loads float32 weights in the configured dtype; both must land."""
    source = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    for method, guard in GUARDS.items():
        target = tmp_path / method
        report = guard_checkpoint(source, target, ["int8"], guard)
        assert {(record.dtype, record.read_dtype) for record in report.tensors} == {("float32", dtype)}
        for record in report.tensors:
            weight = open_checkpoint(target).read(record.key)
            assert torch.equal(
                stock_codes(weight, get_grid("int8")), stock_codes(weight.to(getattr(torch, dtype)), get_grid("int8"))
            )


class TestVerify:
    """Any change to a guarded folder is found."""

    @pytest.fixture
    def guarded(self, llama: Path, tmp_path: Path) -> Path:
        guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], GUARDS["stochastic"])
        return tmp_path / "guarded"

    def edit(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def test_a_moved_weight(self, guarded: Path) -> None:
        key = "model.layers.0.mlp.up_proj.weight"

        def move(tensors: dict[str, torch.Tensor]) -> None:
            tensors[key][3].neg_()

        self.edit(guarded, move)
        report = verify_checkpoint(guarded)
        assert [verdict.name for verdict in report.tensors if not verdict.as_planned] == [key]
        assert report.changed_files == ("model.safetensors",)
        assert not report.clean

    def test_a_change_outside_the_guarded_tensors(self, guarded: Path) -> None:
        self.edit(guarded, lambda tensors: tensors["model.norm.weight"].mul_(2))
        report = verify_checkpoint(guarded)
        assert report.num_tensors_as_planned == len(report.tensors)
        assert report.changed_files == ("model.safetensors",)
        assert not report.clean

    def test_a_missing_tensor(self, guarded: Path) -> None:
        self.edit(guarded, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
        (verdict,) = [verdict for verdict in verify_checkpoint(guarded).tensors if not verdict.as_planned]
        assert verdict.reason == "missing"

    def test_another_dtype(self, guarded: Path) -> None:
        key = "model.layers.0.mlp.up_proj.weight"
        self.edit(guarded, lambda tensors: tensors.update({key: tensors[key].half()}))
        (verdict,) = [verdict for verdict in verify_checkpoint(guarded).tensors if not verdict.as_planned]
        assert "stored as" in verdict.reason

    @pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 99}', '{"kind": "guard", "extra": 1}'])
    def test_a_damaged_manifest(self, content: str, guarded: Path) -> None:
        (guarded / MANIFEST_FILE).write_text(content)
        with pytest.raises(CheckpointError, match="not a valid manifest"):
            verify_checkpoint(guarded)

    def test_no_manifest(self, llama: Path) -> None:
        with pytest.raises(CheckpointError, match="no plan to compare with"):
            verify_checkpoint(llama)


class TestFailsClosed:
    """The target appears whole or not at all."""

    def test_the_target_is_never_overwritten(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        for target in (tmp_path / "mine", llama):
            with pytest.raises(TargetExistsError):
                guard_checkpoint(llama, target, ["nf4"], "stochastic")
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"

    def test_the_target_may_not_lie_in_the_source(self, llama: Path) -> None:
        with pytest.raises(UsageError, match="lies in the folder"):
            guard_checkpoint(llama, llama / "guarded", ["nf4"], "stochastic")
        assert not (llama / "guarded").exists()

    def test_a_failure_leaves_nothing_behind(self, llama: Path, tmp_path: Path) -> None:
        source = shutil.copytree(llama, tmp_path / "source")
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UnguardableError, match=r"layers\.1\.mlp\.down_proj"):
            guard_checkpoint(source, tmp_path / "guarded", ["nf4"], "stochastic")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_a_quantizer_that_disagrees_with_the_plan(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planning with wrong levels stands for a quantizer that changed: the real one must find it out."""
        from qcbguard_plugins.grids import CodebookGrid

        monkeypatch.setattr("qcbguard_plugins.rounding.guard_weight.load_kernels", lambda: None)
        monkeypatch.setattr(CodebookGrid, "level_values", lambda self, codes: self.levels[codes.int()] * 0.8)
        with pytest.raises(VerificationError, match="would not store 14 of 14 tensors"):
            guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], "stochastic")
        assert not (tmp_path / "guarded").exists()

    def test_an_unwritable_target(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot be written"):
            guard_checkpoint(llama, tmp_path / "file" / "guarded", ["nf4"], "stochastic")

    def test_ignored_tensors_are_reported(self, llama: Path, tmp_path: Path) -> None:
        report = guard_checkpoint(
            llama,
            tmp_path / "guarded",
            ["nf4"],
            GUARDS["stochastic"],
            ignore=["*q_proj.weight", r"re:.*layers\.1\.mlp"],
        )
        assert len(report.unguarded) == 5
        assert report.coverage == "9 of 14 target tensors guarded"
        before, after = open_checkpoint(llama), open_checkpoint(tmp_path / "guarded")
        assert all(torch.equal(before.read(name), after.read(name)) for name in report.unguarded)
        assert verify_checkpoint(tmp_path / "guarded").unguarded == report.unguarded

    def test_a_pattern_that_matches_nothing(self, llama: Path, tmp_path: Path) -> None:
        for pattern in ("*.qproj.*", "re:(", "lm_head"):
            with pytest.raises(UsageError, match="--ignore"):
                guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], "stochastic", ignore=[pattern])

    def test_unguarded_copies_in_other_forms_are_left_out(self, llama: Path, tmp_path: Path) -> None:
        source = shutil.copytree(llama, tmp_path / "source")
        (source / "onnx").mkdir()
        (source / "pytorch_model.bin").write_bytes(b"not even opened")
        (source / "onnx" / "model.onnx").write_bytes(b"")
        (source / "notes").mkdir()
        (source / "notes" / "LICENSE").write_text("as you like")
        report = guard_checkpoint(source, tmp_path / "guarded", ["nf4"], "stochastic")
        assert set(report.left_out) == {"pytorch_model.bin", "onnx/model.onnx"}
        assert not (tmp_path / "guarded" / "pytorch_model.bin").exists()
        assert (tmp_path / "guarded" / "notes" / "LICENSE").read_text() == "as you like"

    def test_a_format_is_named_once(self, llama: Path, tmp_path: Path) -> None:
        for formats, reason in ((["nf4", "nf4"], "twice"), ([], "no format")):
            with pytest.raises(UsageError, match=reason):
                guard_checkpoint(llama, tmp_path / "guarded", formats, "stochastic")


class TestSeveralFormats:
    def test_one_folder_serves_both(self, llama: Path, tmp_path: Path) -> None:
        target = tmp_path / "guarded"
        report = guard_checkpoint(llama, target, ["nf4", "int8"], Guard(Stochastic(), seed=1))
        assert {",".join(record.formats) for record in report.tensors} == {"nf4,int8"}
        assert verify_checkpoint(target).clean
        original, guarded = open_checkpoint(llama), open_checkpoint(target)
        for record in report.tensors:
            for name in ("nf4", "int8"):
                for left, deviation in errors_left(original.read(record.key), guarded.read(record.key), get_grid(name)):
                    assert abs(left) < 0.1 + 4 * deviation

    def test_two_that_follow_one_another_are_refused_by_name(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(UnguardableError, match=r"model\.layers.*nf4-b128 and nf4 at once"):
            guard_checkpoint(llama, tmp_path / "guarded", ["nf4", "nf4-b128"], Guard(FlipGuard(0.01), seed=1))
        assert not (tmp_path / "guarded").exists()


def test_the_metadata_of_the_source_is_kept(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    save_file(load_file(llama / "model.safetensors"), source / "model.safetensors", {"format": "pt", "trained": "here"})
    guard_checkpoint(source, tmp_path / "guarded", ["nf4"], "stochastic")
    with safe_open(tmp_path / "guarded" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "trained": "here"}
