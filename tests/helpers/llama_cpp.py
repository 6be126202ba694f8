"""llama.cpp's own tools, as its users call them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from qcbguard_plugins import Calibration, Feedback, Guard, Stochastic
from qcbguard_plugins.backends.ggml.options import GgufOptions
from tests.helpers.gguf_files import QUANTIZE

# Where the build is absent the tests are skipped, and the path must not stand in the way.
OPTIONS = GgufOptions(quantize_path=QUANTIZE if QUANTIZE.is_file() else None)
PROVEN = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "Q4_0", "Q8_0", "IQ4_XS")
GUARD = Guard(Stochastic(), seed=1)
GUARDS = {
    "stochastic": GUARD,
    "feedback": Guard(Feedback(), seed=1, calibration=Calibration(num_sequences=4, sequence_length=32)),
}


def quantize(source: Path, recipe: str, *flags: str) -> Path:
    target = source.with_name(f"{source.stem}-{recipe}{len(flags)}.gguf")
    subprocess.run([str(QUANTIZE), *flags, str(source), str(target), recipe], check=True, capture_output=True)
    return target


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
