"""llama.cpp's converter, guarded in flight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
from qcbguard_plugins.pipeline.gguf_guard import guard_gguf
from qcbguard_plugins.pipeline.verify import verify
from tests.helpers.gguf_files import OLDER, QUANTIZE, TREE, needs_llama_cpp
from tests.helpers.llama_cpp import GUARD, OPTIONS, convert, quantize, script_of

pytestmark = needs_llama_cpp


class TestConverter:
    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qcbguard_plugins.cli", "convert-hf-to-gguf", "--for", "Q4_K_M", "--seed", "1"]
        command += ["--llama-quantize", str(QUANTIZE), str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize("tree", [TREE, OLDER], ids=["package", "single-file"])
    @pytest.mark.parametrize("outtype", ["f32", "bf16"])
    def test_guards_in_flight_what_the_script_writes(
        self, outtype: str, tree: Path, llama_folder: Path, tmp_path: Path
    ) -> None:
        script, flight = script_of(tree, tmp_path), tmp_path / "flight.gguf"
        result = self.run(script, str(llama_folder), "--outtype", outtype, "--outfile", str(flight))
        assert result.returncode == 0, result.stderr[-2000:]
        assert "15 of 15 target tensors guarded" in result.stdout
        assert verify(quantize(flight, "Q4_K_M")).clean
        # The same as to convert first and guard the file then.
        plain = convert(script, llama_folder, tmp_path / "plain.gguf", "--outtype", outtype)
        guard_gguf(plain, tmp_path / "after.gguf", "Q4_K_M", GUARD, options=OPTIONS)
        first, second = open_gguf(flight), open_gguf(tmp_path / "after.gguf")
        assert list(first.tensors) == list(second.tensors)
        for name in first.tensors:
            assert bool((first.read_bytes(name) == second.read_bytes(name)).all())

    def test_fails_closed(self, llama_folder: Path, tmp_path: Path) -> None:
        script = script_of(TREE, tmp_path)
        (tmp_path / "taken.gguf").write_text("mine")
        for arguments, code, reason in (
            (["--outfile", str(tmp_path / "taken.gguf")], 2, "exists already"),
            (["--outfile", str(tmp_path / "big.gguf"), "--bigendian"], 4, "big-endian"),
            (["--outfile", str(tmp_path / "split.gguf"), "--split-max-tensors", "4"], 4, "splitting"),
            (["--outfile", str(tmp_path / "q8.gguf"), "--outtype", "q8_0"], 2, "quantized already"),
        ):
            result = self.run(script, str(llama_folder), *arguments)
            assert result.returncode == code, result.stderr[-2000:]
            assert reason in result.stderr
        assert sorted(file.name for file in tmp_path.glob("*.gguf*")) == ["taken.gguf"]
        assert (tmp_path / "taken.gguf").read_text() == "mine"
