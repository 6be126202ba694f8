"""GGUF files: models, quantized models, importance matrices."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.fuzz.registry import Prepared, target


def _gguf_model(folder: Path) -> bytes:
    from tests.helpers.gguf_files import write_model

    return write_model(folder / "seed.gguf", hidden=32, ffn=32).read_bytes()


@target("gguf", "a GGUF file: header, tensors, and the plan for it")
def _gguf(folder: Path) -> Prepared:
    from qcbguard_plugins.backends.ggml.options import GgufOptions
    from qcbguard_plugins.pipeline.gguf_plan import make_gguf_plan

    def read(path: Path) -> None:
        plan = make_gguf_plan(path, "Q4_K_M", GgufOptions())
        for tensor in plan.targets:
            plan.file.read(tensor.name).float()

    return Prepared(folder / "model.gguf", [_gguf_model(folder)], read)


@target("gguf-scan", "a GGUF file as the scanner reads it")
def _gguf_scan(folder: Path) -> Prepared:
    from qcbguard_plugins.checkpoint.open_weights import open_weights

    def read(path: Path) -> None:
        source = open_weights(path)
        for tensor in source.targets:
            if not tensor.unusable:
                source.read(tensor)

    return Prepared(folder / "model.gguf", [_gguf_model(folder)], read)


@target("gguf-quantized", "a quantized GGUF file with its plan, as verify reads it")
def _gguf_quantized(folder: Path) -> Prepared:
    from qcbguard_plugins.backends.ggml.artifact import stored_digest
    from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
    from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
    from qcbguard_plugins.pipeline.verify import verify
    from tests.helpers.gguf_files import write_quantized

    path = folder / "seed.gguf"
    types = ["Q4_0", "Q8_0"]
    write_quantized(path, types, {GGUF_PROVENANCE_KEY: "{}"})
    file = open_gguf(path)
    digests = {name: stored_digest(file, tensor) for name, tensor in file.tensors.items()}
    write_quantized(path, types, {GGUF_PROVENANCE_KEY: manifest_of("gguf:Q4_0", digests, types)})
    return Prepared(folder / "model.gguf", [path.read_bytes()], verify)


def manifest_of(format: str, digests: dict[str, str], types: list[str]) -> str:
    from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord

    tensors = tuple(
        TensorRecord(
            name=name, key=name, shape=(4, 32), transposed=False, dtype="float32", read_dtype="float32",
            num_weights=128, num_moved=0, num_frozen=0, relative_change=0.0, codes_sha256=digest,
            formats=(f"gguf:{type_name}",),
        )
        for (name, digest), type_name in zip(digests.items(), types, strict=True)
    )  # fmt: skip
    report = GuardReport(
        created="", versions={}, source="", formats=(format,), method="stochastic", parameters={}, seed=0,
        calibration=None, tensors=tensors, elapsed_s=0.0,
    )  # fmt: skip
    return report.model_dump_json()


@target("imatrix", "an importance matrix")
def _imatrix(folder: Path) -> Prepared:
    import torch

    from qcbguard_plugins.backends.ggml.imatrix import read_imatrix
    from tests.helpers.gguf_files import write_imatrix

    seed = write_imatrix(folder / "seed.gguf", {"a.weight": torch.ones(16), "b.weight": torch.ones(8)}).read_bytes()

    def read(path: Path) -> None:
        imatrix = read_imatrix(path)
        for name in ("a.weight", "b.weight", "token_embd.weight"):
            imatrix.of(name, 1, 16 if name == "a.weight" else 8)

    return Prepared(folder / "imatrix.gguf", [seed], read)
