"""The guard and llama.cpp's own tools, end to end on small models."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Starcoder2Config,
)

from qcbguard_plugins import Calibration, Feedback, Guard, Stochastic, guard_checkpoint, verify_checkpoint
from qcbguard_plugins.backends.gguf.dry_run import dry_run_types
from qcbguard_plugins.backends.gguf.file import PROVENANCE_KEY, guard_gguf
from qcbguard_plugins.backends.gguf.folder import ARCHITECTURES, folder_types
from qcbguard_plugins.backends.gguf.options import GgufOptions
from qcbguard_plugins.backends.gguf.plan import make_gguf_plan, model_shape
from qcbguard_plugins.backends.gguf.recipes import RECIPES, predict_types, resolve_recipe
from qcbguard_plugins.backends.gguf.verify import verify_gguf
from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import UnguardableError, UsageError
from tests.gguf_files import IMATRIX, OLDER, QUANTIZE, TREE, needs_llama_cpp, normal, write_imatrix, write_model

pytestmark = needs_llama_cpp
# Where the build is absent every test below is skipped, and the path must not stand in the way.
OPTIONS = GgufOptions(quantize_path=QUANTIZE if QUANTIZE.is_file() else None)
PROVEN = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "Q4_0", "Q8_0", "IQ4_XS")
GUARD = Guard(Stochastic(), seed=1)
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# One whose matrices are stored transposed, one whose rows are reordered, two that are copied as they are.
OTHER_ARCHITECTURES = {
    "gpt2": GPT2Config(
        vocab_size=320, n_embd=256, n_layer=2, n_head=4, n_positions=128, n_ctx=128, bos_token_id=1, eos_token_id=2
    ),
    "mistral": MistralConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "starcoder2": Starcoder2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
}


def quantize(source: Path, recipe: str, *flags: str) -> Path:
    target = source.with_name(f"{source.stem}-{recipe}{len(flags)}.gguf")
    subprocess.run([str(QUANTIZE), *flags, str(source), str(target), recipe], check=True, capture_output=True)
    return target


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder whose rows K-quants fit; grouped heads, so the converter reorders rows."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf") / "llama"
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def script_of(tree: Path, folder: Path) -> Path:
    """The tree's converter as a user starts it, but for its list of tokenizers, which no test model can be on."""
    for name in ("gguf-py", "conversion"):
        if (tree / name).exists():
            (folder / name).symlink_to(tree / name)
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(
        textwrap.dedent(f"""\
        import importlib.util, sys
        from unittest.mock import MagicMock
        import transformers
        transformers.AutoConfig
        # An optional library of one model family, which the older script imports in any case.
        parts = ["", ".tokens", ".tokens.tokenizers"]
        parts += [".tokens.tokenizers." + name for name in ("base", "multimodal", "tekken", "sentencepiece")]
        stand_ins = [name for name in ("mistral_common" + part for part in parts) if name not in sys.modules]
        sys.modules.update({{name: MagicMock() for name in stand_ins}})
        spec = importlib.util.spec_from_file_location("converter", {str(tree / "convert_hf_to_gguf.py")!r})
        converter = importlib.util.module_from_spec(spec)
        sys.modules["converter"] = converter
        spec.loader.exec_module(converter)
        for name in stand_ins:
            del sys.modules[name]
        base = sys.modules.get("conversion.base", converter)
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        if __name__ == "__main__":
            converter.main()
        """)
    )
    return script


def convert(script: Path, source: Path, target: Path, *flags: str) -> Path:
    command = [sys.executable, str(script), str(source), "--outfile", str(target), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return target


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


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_folders_types_before_anything_is_converted(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(
        model_type, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, head_dim=64, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    asked = folder_types(config, shapes, "Q4_K_M", OPTIONS)
    monkeypatch.setenv("PATH", "")
    predicted = folder_types(config, shapes, "Q4_K_M", GgufOptions())
    assert asked.types == predicted.types
    assert len(asked.types) >= 10


class TestGgufFile:
    @pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
    @pytest.mark.parametrize("recipe", PROVEN)
    def test_what_llama_quantize_stores_is_the_plan(self, recipe: str, type_name: str, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", type_name=type_name)
        target = tmp_path / "guarded.gguf"
        report = guard_gguf(source, target, recipe, GUARD, options=OPTIONS)
        before, after = open_gguf(source), open_gguf(target)
        assert {k: v for k, v in after.metadata.items() if k != PROVENANCE_KEY} == before.metadata
        assert [(t.name, t.type_name, t.shape) for t in before.tensors.values()] == [
            (t.name, t.type_name, t.shape) for t in after.tensors.values()
        ]
        targets = {record.name for record in report.tensors}
        for name in before.tensors:
            assert bool((before.read_bytes(name) == after.read_bytes(name)).all()) == (name not in targets)
        verdict = verify_gguf(quantize(target, recipe))
        assert verdict.clean and verdict.num_as_planned == len(targets) == 8
        assert (report.share_landed or 0) >= 0.99
        assert "--dry-run, version" in report.toolchain["types_from"]

    def test_guarding_again_replaces_the_provenance(self, model: Path, tmp_path: Path) -> None:
        guard_gguf(model, tmp_path / "once.gguf", "Q4_0", GUARD, options=OPTIONS)
        guard_gguf(tmp_path / "once.gguf", tmp_path / "twice.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        assert verify_gguf(quantize(tmp_path / "twice.gguf", "Q4_K_M")).format == "gguf:Q4_K_M"

    def test_stacked_experts(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", num_experts=4)
        report = guard_gguf(source, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        assert {record.shape for record in report.tensors if "exps" in record.name} == {(2048, 256), (1024, 512)}
        assert verify_gguf(quantize(tmp_path / "guarded.gguf", "Q4_K_M")).clean

    def test_rows_that_256_does_not_divide_are_guarded_on_the_fallback(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", hidden=320, ffn=96)
        report = guard_gguf(source, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        assert {record.format for record in report.tensors} == {"gguf:Q5_0", "gguf:Q8_0"}
        assert verify_gguf(quantize(tmp_path / "guarded.gguf", "Q4_K_M")).clean

    def test_the_users_own_flags(self, model: Path, tmp_path: Path) -> None:
        flags = ("--tensor-type", "attn_q=q5_1", "--output-tensor-type", "q8_0")
        options = GgufOptions(quantize_path=QUANTIZE, quantize_args=flags)
        report = guard_gguf(model, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=options)
        types = {record.name: record.format for record in report.tensors}
        assert types["blk.0.attn_q.weight"] == "gguf:Q5_1"
        assert verify_gguf(quantize(tmp_path / "guarded.gguf", "Q4_K_M", *flags)).clean
        assert not verify_gguf(quantize(tmp_path / "guarded.gguf", "Q4_K_M")).clean
        unknown = GgufOptions(quantize_path=QUANTIZE, quantize_args=("--tensor-type", "attn_q=iq3_s"))
        with pytest.raises(UnguardableError, match=r"attn_q\.weight  IQ3_S"):
            make_gguf_plan(model, "Q4_K_M", unknown)

    def test_ignored_tensors_are_listed_and_left_alone(self, model: Path, tmp_path: Path) -> None:
        report = guard_gguf(model, tmp_path / "g.gguf", "Q4_K_M", GUARD, options=OPTIONS, ignore=["blk.0.*"])
        assert len(report.unguarded) == 7
        verdict = verify_gguf(quantize(tmp_path / "g.gguf", "Q4_K_M"))
        assert verdict.clean and len(verdict.unguarded) == 7

    def test_a_file_larger_than_memory_is_streamed(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model.gguf", num_layers=40, ffn=2048)
        code = f"""
            import resource, torch
            from qcbguard_plugins.backends.gguf.file import guard_gguf
            from qcbguard_plugins.backends.gguf.library import load_library
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
        verdict = verify_gguf(quantize(model, "Q4_K_M"), plan=guarded)
        assert verdict.num_as_planned == 0
        assert {tensor.reason for tensor in verdict.tensors} == {"other codes than planned"}

    def test_another_type(self, guarded: Path) -> None:
        verdict = verify_gguf(quantize(guarded, "Q5_K_M"))
        assert "stored as Q5_K, planned as Q4_K" in {tensor.reason for tensor in verdict.tensors}

    def test_an_importance_matrix_that_was_not_planned(self, model: Path, tmp_path: Path) -> None:
        # Q5_K, because grid points of many types are found again whatever weighs them: such a file is as planned.
        guard_gguf(model, tmp_path / "guarded.gguf", "Q5_K_S", GUARD, options=OPTIONS)
        names = [f"blk.{i}.attn_{part}.weight" for i in range(2) for part in ("q", "k", "v", "output")]
        columns = {name: normal(256, seed=i, std=1.0).abs() ** 4 + 1e-3 for i, name in enumerate(names)}
        matrix = write_imatrix(tmp_path / "i.gguf", columns)
        verdict = verify_gguf(quantize(tmp_path / "guarded.gguf", "Q5_K_S", "--imatrix", str(matrix)))
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
        assert verify_gguf(quantize(guarded, "Q4_K_M", "--imatrix", str(planned))).clean
        assert not verify_gguf(quantize(guarded, "Q4_K_M", "--imatrix", str(other))).clean
        missing = verify_gguf(quantize(guarded, "Q4_K_M"))
        assert any("without an importance matrix, and planned with one" in tensor.reason for tensor in missing.tensors)


class TestFolder:
    @pytest.mark.parametrize("recipe", ["Q4_K_M", "Q3_K_M", "Q8_0"])
    @pytest.mark.parametrize("method", ["stochastic", "feedback"])
    def test_guard_convert_quantize_verify(self, method: str, recipe: str, folder: Path, tmp_path: Path) -> None:
        feedback = Guard(Feedback(), seed=1, calibration=Calibration(num_sequences=4, sequence_length=32))
        guarded = tmp_path / "guarded"
        guard = feedback if method == "feedback" else GUARD
        report = guard_checkpoint(folder, guarded, [f"gguf:{recipe}"], guard, gguf=OPTIONS)
        assert {record.dtype for record in report.tensors} == {"float16"}
        assert len(report.tensors) == 15
        assert (report.share_landed or 0) >= 0.99
        assert verify_checkpoint(guarded).clean
        converted = convert(script_of(TREE, tmp_path), guarded, tmp_path / "model.gguf", "--outtype", "f32")
        assert verify_gguf(quantize(converted, recipe), plan=guarded).clean

    @pytest.mark.parametrize("outtype", ["f16", "bf16"])
    def test_the_outtype_of_the_conversion_is_part_of_the_plan(
        self, outtype: str, folder: Path, tmp_path: Path
    ) -> None:
        options = GgufOptions(quantize_path=QUANTIZE, outtype=outtype)
        guard_checkpoint(folder, tmp_path / "guarded", ["gguf:Q4_K_M"], GUARD, gguf=options)
        converted = convert(script_of(TREE, tmp_path), tmp_path / "guarded", tmp_path / "m.gguf", "--outtype", outtype)
        assert verify_gguf(quantize(converted, "Q4_K_M"), plan=tmp_path / "guarded").clean

    def test_with_another_toolchain_at_once(self, folder: Path, tmp_path: Path) -> None:
        report = guard_checkpoint(folder, tmp_path / "guarded", ["nf4", "gguf:Q4_K_M"], GUARD, gguf=OPTIONS)
        formats = {record.name: record.format for record in report.tensors}
        assert formats["model.layers.0.mlp.up_proj.weight"] == "gguf:Q4_K,nf4"
        assert formats["model.embed_tokens.weight"] == "gguf:Q6_K"
        assert verify_checkpoint(tmp_path / "guarded").clean

    def test_without_the_binary_the_types_are_predicted(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = guard_checkpoint(folder, tmp_path / "asked", ["gguf:Q4_K_M"], GUARD, gguf=OPTIONS)
        monkeypatch.setenv("PATH", "")
        report = guard_checkpoint(folder, tmp_path / "predicted", ["gguf:Q4_K_M"], GUARD)
        assert report.toolchain["types_from"].startswith("predicted")
        assert report.codes_sha256 == asked.codes_sha256

    def test_an_architecture_whose_matrices_are_rearranged(
        self, model_folder: Callable[[str], Path], tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=r"qcbguard gguf MODEL\.gguf GUARDED\.gguf --for Q4_K_M"):
            guard_checkpoint(model_folder("mixtral"), tmp_path / "guarded", ["gguf:Q4_K_M"], GUARD)

    @pytest.mark.parametrize("method", ["stochastic", "feedback"])
    @pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
    def test_other_architectures(
        self, architecture: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHER_ARCHITECTURES[architecture])
        model.to(torch.float16).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        feedback = Guard(Feedback(), seed=1, calibration=Calibration(num_sequences=4, sequence_length=32))
        guard = feedback if method == "feedback" else GUARD
        report = guard_checkpoint(tmp_path / "model", tmp_path / "guarded", ["gguf:Q4_K_M"], guard, gguf=OPTIONS)
        script = script_of(TREE, tmp_path)
        converted = convert(script, tmp_path / "guarded", tmp_path / "model.gguf", "--outtype", "f32")
        verdict = verify_gguf(quantize(converted, "Q4_K_M"), plan=tmp_path / "guarded")
        assert verdict.clean and verdict.num_as_planned == len(report.tensors) > 8


class TestConverter:
    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qcbguard_plugins.cli", "convert-hf-to-gguf", "--for", "Q4_K_M", "--seed", "1"]
        command += ["--llama-quantize", str(QUANTIZE), str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize("tree", [TREE, OLDER], ids=["package", "single-file"])
    @pytest.mark.parametrize("outtype", ["f32", "bf16"])
    def test_guards_in_flight_what_the_script_writes(
        self, outtype: str, tree: Path, folder: Path, tmp_path: Path
    ) -> None:
        script, flight = script_of(tree, tmp_path), tmp_path / "flight.gguf"
        result = self.run(script, str(folder), "--outtype", outtype, "--outfile", str(flight))
        assert result.returncode == 0, result.stderr[-2000:]
        assert "15 of 15 target tensors guarded" in result.stdout
        assert verify_gguf(quantize(flight, "Q4_K_M")).clean
        # The same as to convert first and guard the file then.
        plain = convert(script, folder, tmp_path / "plain.gguf", "--outtype", outtype)
        guard_gguf(plain, tmp_path / "after.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        first, second = open_gguf(flight), open_gguf(tmp_path / "after.gguf")
        assert list(first.tensors) == list(second.tensors)
        for name in first.tensors:
            assert bool((first.read_bytes(name) == second.read_bytes(name)).all())

    def test_fails_closed(self, folder: Path, tmp_path: Path) -> None:
        script = script_of(TREE, tmp_path)
        (tmp_path / "taken.gguf").write_text("mine")
        for arguments, code, reason in (
            (["--outfile", str(tmp_path / "taken.gguf")], 2, "exists already"),
            (["--outfile", str(tmp_path / "big.gguf"), "--bigendian"], 4, "big-endian"),
            (["--outfile", str(tmp_path / "split.gguf"), "--split-max-tensors", "4"], 4, "splitting"),
            (["--outfile", str(tmp_path / "q8.gguf"), "--outtype", "q8_0"], 2, "quantized already"),
        ):
            result = self.run(script, str(folder), *arguments)
            assert result.returncode == code, result.stderr[-2000:]
            assert reason in result.stderr
        assert sorted(file.name for file in tmp_path.glob("*.gguf*")) == ["taken.gguf"]
        assert (tmp_path / "taken.gguf").read_text() == "mine"


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

    def test_guard_a_folder(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["guard", str(folder), "--for", "gguf:Q4_K_M", "--method", "stochastic"]
        assert main([*arguments, "--dry-run"]) == 0
        assert "15 of 15 target tensors will be guarded" in capsys.readouterr().out
        assert main([*arguments, "--out", str(tmp_path / "guarded")]) == 0
        assert main(["verify", str(tmp_path / "guarded")]) == 0


def test_llama_imatrixs_own_file_is_read(folder: Path, tmp_path: Path) -> None:
    source = convert(script_of(TREE, tmp_path), folder, tmp_path / "model.gguf", "--outtype", "f32")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    command = [str(IMATRIX), "-m", str(source), "-f", str(tmp_path / "text.txt"), "-o", str(tmp_path / "i.gguf")]
    subprocess.run([*command, "-c", "64", "-ngl", "0"], check=True, capture_output=True)
    options = GgufOptions(quantize_path=QUANTIZE, imatrix_path=tmp_path / "i.gguf")
    report = guard_gguf(source, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=options)
    assert (report.share_landed or 0) >= 0.98
    assert verify_gguf(quantize(tmp_path / "guarded.gguf", "Q4_K_M", "--imatrix", str(tmp_path / "i.gguf"))).clean


@pytest.mark.parametrize("recipe", PROVEN)
def test_llama_cpp_generates_from_the_result(recipe: str, folder: Path, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    guarded = tmp_path / "guarded"
    guard_checkpoint(folder, guarded, [f"gguf:{recipe}"], GUARD, gguf=OPTIONS)
    source = convert(script_of(TREE, tmp_path), guarded, tmp_path / "model.gguf", "--outtype", "f32")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(quantize(source, recipe))
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    parameters.cpuparams.n_threads = 1
    answer = xllamacpp.Server(parameters).handle_completions(
        {"prompt": "the quick", "max_tokens": 8, "temperature": 0.0}
    )
    assert answer["usage"]["completion_tokens"] > 0


def test_nothing_of_ours_is_left_in_temporary_folders(model: Path, tmp_path: Path) -> None:
    guard_gguf(model, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=OPTIONS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["guarded.gguf", "model.gguf"]
