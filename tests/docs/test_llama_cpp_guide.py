"""The guide for llama.cpp on a shipped example model, through llama-quantize."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcbguard_plugins.cli import main
from tests.conftest import ROOT
from tests.helpers.gguf_files import QUANTIZE, needs_llama_cpp

pytest.importorskip("gguf")


@needs_llama_cpp
@pytest.mark.parametrize("recipe", ["Q4_0", "Q4_K_M"])
def test_an_example_model_from_the_folder_to_a_verified_file(recipe: str, tmp_path: Path) -> None:
    source, guarded, quantized = (tmp_path / name for name in ("f32.gguf", "guarded.gguf", "quantized.gguf"))
    script = [sys.executable, str(ROOT / "examples" / "to_gguf.py"), str(ROOT / "examples" / "models" / "attacked")]
    subprocess.run([*script, str(source)], check=True)
    assert main(["gguf", str(source), str(guarded), "--for", recipe]) == 0
    subprocess.run([str(QUANTIZE), str(guarded), str(quantized), recipe], check=True, capture_output=True)
    assert main(["verify", str(quantized)]) == 0
    # A file that was not guarded is not as planned: it has no plan at all.
    stock = tmp_path / "stock.gguf"
    subprocess.run([str(QUANTIZE), str(source), str(stock), recipe], check=True, capture_output=True)
    assert main(["verify", str(stock)]) not in (0, 1)


def test_the_file_has_the_weights_of_the_model(tmp_path: Path) -> None:
    """llama.cpp's order of rows in query and key, and every other tensor as it is."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    model = ROOT / "examples" / "models" / "clean"
    command = [sys.executable, str(ROOT / "examples" / "to_gguf.py"), str(model), str(tmp_path / "m.gguf")]
    subprocess.run(command, check=True)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    stored = load_file(model / "model.safetensors")
    assert len(tensors) == len(stored)
    query, written = stored["model.layers.0.self_attn.q_proj.weight"], tensors["blk.0.attn_q.weight"]
    # Row pair (i, i + 32) of a head of 64 becomes (2i, 2i + 1).
    np.testing.assert_array_equal(written[0:4], query[[0, 32, 1, 33]].astype(np.float32))
    np.testing.assert_array_equal(tensors["token_embd.weight"], stored["model.embed_tokens.weight"].astype(np.float32))
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr
