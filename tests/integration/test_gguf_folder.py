"""Hugging Face folders, guarded before llama.cpp converts and quantizes them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qcbguard_plugins import guard_checkpoint, verify_checkpoint
from qcbguard_plugins.backends.ggml.backend import Ggml
from qcbguard_plugins.backends.ggml.folder import ARCHITECTURES, folder_targets
from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.pipeline.gguf_guard import guard_gguf
from qcbguard_plugins.pipeline.verify import verify
from tests.helpers.gguf_files import IMATRIX, QUANTIZE, TREE, needs_llama_cpp
from tests.helpers.llama_cpp import GUARD, GUARDS, OPTIONS, PROVEN, convert, quantize, script_of

pytestmark = needs_llama_cpp


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_folders_types_before_anything_is_converted(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(
        model_type, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, head_dim=64, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    asked = folder_targets(model, "Q4_K_M", OPTIONS)
    monkeypatch.setenv("PATH", "")
    predicted = folder_targets(model, "Q4_K_M", GgufOptions())
    types = {name: target.formats for name, target in asked.targets.items()}
    assert types == {name: target.formats for name, target in predicted.targets.items()}
    assert len(types) >= 9


class TestFolder:
    @pytest.mark.parametrize("recipe", ["Q4_K_M", "Q3_K_M", "Q8_0"])
    @pytest.mark.parametrize("method", ["stochastic", "feedback"])
    def test_guard_convert_quantize_verify(self, method: str, recipe: str, llama_folder: Path, tmp_path: Path) -> None:
        guarded = tmp_path / "guarded"
        report = guard_checkpoint(llama_folder, guarded, [f"gguf:{recipe}"], GUARDS[method], backends=[Ggml(OPTIONS)])
        assert {record.dtype for record in report.tensors} == {"float16"}
        assert len(report.tensors) == 15
        assert (report.share_as_planned or 0) >= 0.99
        assert verify_checkpoint(guarded).clean
        converted = convert(script_of(TREE, tmp_path), guarded, tmp_path / "model.gguf", "--outtype", "f32")
        assert verify(quantize(converted, recipe), plan=guarded).clean

    @pytest.mark.parametrize("outtype", ["f16", "bf16"])
    def test_the_outtype_of_the_conversion_is_part_of_the_plan(
        self, outtype: str, llama_folder: Path, tmp_path: Path
    ) -> None:
        options = GgufOptions(quantize_path=QUANTIZE, outtype=outtype)
        guard_checkpoint(llama_folder, tmp_path / "guarded", ["gguf:Q4_K_M"], GUARD, backends=[Ggml(options)])
        converted = convert(script_of(TREE, tmp_path), tmp_path / "guarded", tmp_path / "m.gguf", "--outtype", outtype)
        assert verify(quantize(converted, "Q4_K_M"), plan=tmp_path / "guarded").clean

    def test_with_another_toolchain_at_once(self, llama_folder: Path, tmp_path: Path) -> None:
        report = guard_checkpoint(
            llama_folder, tmp_path / "guarded", ["nf4", "gguf:Q4_K_M"], GUARD, backends=[Ggml(OPTIONS)]
        )
        formats = {record.name: ",".join(record.formats) for record in report.tensors}
        assert formats["model.layers.0.mlp.up_proj.weight"] == "gguf:Q4_K,nf4"
        assert formats["model.embed_tokens.weight"] == "gguf:Q6_K"
        assert verify_checkpoint(tmp_path / "guarded").clean

    def test_without_the_binary_the_types_are_predicted(
        self, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = guard_checkpoint(llama_folder, tmp_path / "asked", ["gguf:Q4_K_M"], GUARD, backends=[Ggml(OPTIONS)])
        monkeypatch.setenv("PATH", "")
        report = guard_checkpoint(llama_folder, tmp_path / "predicted", ["gguf:Q4_K_M"], GUARD)
        assert report.toolchain["types_from"].startswith("predicted")
        assert report.codes_sha256 == asked.codes_sha256

    def test_an_architecture_whose_matrices_are_rearranged(
        self, model_folder: Callable[[str], Path], tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=r"qcbguard gguf MODEL\.gguf GUARDED\.gguf --for Q4_K_M"):
            guard_checkpoint(model_folder("mixtral"), tmp_path / "guarded", ["gguf:Q4_K_M"], GUARD)


def test_guard_a_folder(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["guard", str(llama_folder), "--for", "gguf:Q4_K_M", "--method", "stochastic"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "15 of 15 target tensors will be guarded" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "guarded")]) == 0
    assert main(["verify", str(tmp_path / "guarded")]) == 0


def test_llama_imatrixs_own_file_is_read(llama_folder: Path, tmp_path: Path) -> None:
    source = convert(script_of(TREE, tmp_path), llama_folder, tmp_path / "model.gguf", "--outtype", "f32")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    command = [str(IMATRIX), "-m", str(source), "-f", str(tmp_path / "text.txt"), "-o", str(tmp_path / "i.gguf")]
    subprocess.run([*command, "-c", "64", "-ngl", "0"], check=True, capture_output=True)
    options = GgufOptions(quantize_path=QUANTIZE, imatrix_path=tmp_path / "i.gguf")
    report = guard_gguf(source, tmp_path / "guarded.gguf", "Q4_K_M", GUARD, options=options)
    assert (report.share_as_planned or 0) >= 0.98
    assert verify(quantize(tmp_path / "guarded.gguf", "Q4_K_M", "--imatrix", str(tmp_path / "i.gguf"))).clean


@pytest.mark.parametrize("recipe", PROVEN)
def test_llama_cpp_generates_from_the_result(recipe: str, llama_folder: Path, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    guarded = tmp_path / "guarded"
    guard_checkpoint(llama_folder, guarded, [f"gguf:{recipe}"], GUARD, backends=[Ggml(OPTIONS)])
    source = convert(script_of(TREE, tmp_path), guarded, tmp_path / "model.gguf", "--outtype", "f32")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(quantize(source, recipe))
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    parameters.cpuparams.n_threads = 1
    answer = xllamacpp.Server(parameters).handle_completions(
        {"prompt": "the quick", "max_tokens": 8, "temperature": 0.0}
    )
    assert answer["usage"]["completion_tokens"] > 0
