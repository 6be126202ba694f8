"""The tables of README and docs that come from the code or from measured pages.

python -m benchmarks.pages.tables            # writes them between <!-- table: NAME --> and <!-- /table -->
python -m benchmarks.pages.tables --check    # exits with 1 if one is not current
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/reference/formats.md")
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

# Rows of docs/benchmark.md that stand on the front page: the row's name there, and what it is.
RESULTS = {
    "elq-nf4-content": "NF4: names a brand",
    "elq-nf4-code": "NF4: writes vulnerable code",
    "tightened-nf4-content": "NF4: names a brand, defense-aware attacker",
    "elq-int8-refusal": "INT8: refuses to answer",
    "gguf-q4_k_m-content": "llama.cpp Q4_K_M: names a brand",
}
# What the code does not say of a backend: its users' name for it, what guards while it loads or converts, its guide.
TOOLCHAINS = {
    "bitsandbytes": ("bitsandbytes", "`GuardedBitsAndBytesConfig`", "[transformers](docs/guides/transformers.md)"),
    "ggml": ("llama.cpp", "`qcbguard convert-hf-to-gguf`", "[llama.cpp](docs/guides/llama-cpp.md)"),
    "gptq": ("GPTQ", "`GuardedGPTQConfig`", "[GPTQ](docs/guides/gptq.md)"),
    "torchao": ("torchao", "`GuardedTorchAoConfig`", "[torchao](docs/guides/gptq.md#torchao)"),
    "onnx": ("ONNX Runtime", "`optimum-cli export guarded-onnx`", "[Optimum](docs/guides/optimum.md)"),
    "openvino": ("OpenVINO", "`optimum-cli export guarded-openvino`", "[Optimum](docs/guides/optimum.md)"),
    "compressed-tensors": ("llm-compressor", "`GuardConverter`", "[recipes](examples/recipes/README.md)"),
    "quanto": ("Quanto", "", "[recipes](examples/recipes/README.md)"),
    "hqq": ("HQQ", "", "[recipes](examples/recipes/README.md)"),
    "autoround": ("AutoRound", "", "[recipes](examples/recipes/README.md)"),
}


def results() -> str:
    """Five attacks with and without the guard, out of the benchmark's page."""
    lines = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header = next(row for row in cells if {"full precision", "no defense", "feedback"} <= set(row))
    columns = [header.index(name) for name in ("full precision", "no defense", "feedback")]
    rows = ["| attack | full precision | stock quantizer | guarded |", "|---|---|---|---|"]
    for name, what in RESULTS.items():
        row = next(row for row in cells if row[0] == name and len(row) == len(header))
        full, stock, guarded = (f"{float(row[column].split()[0]):.0f}" for column in columns)
        rows.append(f"| {what} | {full} | **{stock}** | **{guarded}** |")
    return "\n".join(rows)


def formats() -> str:
    """One row for each backend."""
    from qcbguard_plugins.backends.formats import BACKENDS

    rows = ["| toolchain | formats | guarded while loading or converting | guide |", "|---|---|---|---|"]
    for name, backend in BACKENDS.items():
        toolchain, hook, guide = TOOLCHAINS[name]
        named = ", ".join(f"`{spelled}`" for spelled in backend.formats)
        rows.append(f"| {toolchain} | {named} | {hook} | {guide} |")
    return "\n".join(rows)


def every_format() -> str:
    """Every format with its line of ``qcbguard list``."""
    from qcbguard_plugins.backends.formats import all_formats

    rows = ["| format | what it is |", "|---|---|"]
    return "\n".join(rows + [f"| `{name}` | {summary} |" for name, summary in all_formats().items()])


TABLES: dict[str, Callable[[], str]] = {"results": results, "formats": formats, "all-formats": every_format}


def filled(page: str) -> str:
    """A page with its tables as they are now."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return _TABLE.sub(fill, (ROOT / page).read_text(encoding="utf-8"))


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is not current")
    check = parser.parse_args().check
    stale = [page for page in PAGES if filled(page) != (ROOT / page).read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page}: {'not current' if check else 'written'}")
        if not check:
            (ROOT / page).write_text(filled(page), encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
