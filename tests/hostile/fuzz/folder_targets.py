"""Checkpoint folders, guarded folders, and what an interrupted run leaves."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from qcbguard_plugins.checkpoint.manifest import TensorRecord
from tests.hostile.fuzz import mutation
from tests.hostile.fuzz.registry import Prepared, target


def tiny_llama(folder: Path) -> Path:
    """A checkpoint folder of some kilobytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True, dtype="float16",
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = {k: v.half() for k, v in LlamaForCausalLM(config).state_dict().items() if k != "lm_head.weight"}
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@target("safetensors", "a .safetensors file, its header and every tensor", mutation.safetensors_header)
def _safetensors(folder: Path) -> Prepared:
    import torch
    from safetensors.torch import save

    from qcbguard_plugins.checkpoint.open_weights import open_weights

    rows = torch.arange(64.0).view(4, 16)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn]
    tensors = {f"layers.{i}.up_proj.weight": rows.to(dtype) for i, dtype in enumerate(dtypes)}
    stacked = {
        "experts.gate_up_proj": torch.zeros(2, 2, 16),
        "h.0.c_fc.weight": torch.zeros(4, 16),
        "a.weight": torch.zeros(0, 4),
    }

    def read(path: Path) -> None:
        source = open_weights(path)
        for tensor in source.targets:
            if tensor.dtype is not None:
                source.read(tensor)

    return Prepared(folder / "model.safetensors", [save(tensors, {"format": "pt"}), save(stacked)], read)


@target("safetensors-index", "model.safetensors.index.json beside two shards", mutation.json_document)
def _index(folder: Path) -> Prepared:
    import torch
    from safetensors.torch import save_file

    from qcbguard_plugins.checkpoint import open_checkpoint

    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file({f"{number}.{part}.weight": torch.zeros(4, 4) for part in "ab"}, folder / name)
    (folder / "config.json").write_text("{}")
    weight_map = {f"{number}.{part}.weight": names[number] for number in (0, 1) for part in "ab"}
    index = {"metadata": {"total_size": 256}, "weight_map": weight_map}
    seed = json.dumps(index).encode()
    return Prepared(folder / "model.safetensors.index.json", [seed], lambda path: open_checkpoint(path.parent))


@target("config", "config.json of a checkpoint folder, up to the plan", mutation.json_document)
def _config(folder: Path) -> Prepared:
    from qcbguard_plugins.pipeline.plan import make_plan

    path = tiny_llama(folder / "model") / "config.json"
    return Prepared(path, [path.read_bytes()], lambda path: make_plan(path.parent, "nf4"))


@target("manifest", "qcbguard.json of a guarded folder, as verify reads it", mutation.json_document)
def _manifest_file(folder: Path) -> Prepared:
    from qcbguard_plugins import Guard, Stochastic, guard_checkpoint, verify_checkpoint

    guarded = folder / "guarded"
    guard_checkpoint(tiny_llama(folder / "model"), guarded, ["nf4"], Guard(Stochastic(), seed=0))
    path = guarded / "qcbguard.json"
    return Prepared(path, [path.read_bytes()], lambda path: verify_checkpoint(path.parent))


def _interrupted(folder: Path, name: str) -> Prepared:
    """An interrupted run on a folder; one of its files is the input, and reading it is going on with the run."""
    from qcbguard_plugins.checkpoint import open_checkpoint, partial_of, resumable_folder

    checkpoint = open_checkpoint(tiny_llama(folder / "model"))
    target_dir, kept = folder / "guarded", folder / "kept"
    partial = partial_of(target_dir)

    def go_on(_: Path) -> None:
        with contextlib.suppress(_Stop), resumable_folder(target_dir, checkpoint, {"format": "nf4"}) as staging:
            staging.remember("seed", lambda: 7)
            staging.copy_rest(checkpoint.shards, [])
            for entry in checkpoint.tensors.values():
                stored, digest = staging.read(entry.key)
                if staging.resumed(entry.key) is None and not kept.exists():
                    staging.write(entry.key, digest, stored, unchanged_record(entry.key))
            raise _Stop

    def reset() -> None:
        if not (partial / "request.json").exists():
            shutil.copytree(kept, partial, dirs_exist_ok=True)

    go_on(folder)
    shutil.copytree(partial, kept)
    return Prepared(partial / name, [(partial / name).read_bytes()], go_on, reset)


class _Stop(BaseException):
    """Ends a run from inside, as a kill would."""


def unchanged_record(name: str) -> TensorRecord:
    return TensorRecord(
        name=name, key=name, shape=(4, 32), transposed=False, dtype="float32", read_dtype="float32", num_weights=128,
        num_moved=0, num_frozen=0, relative_change=0.0, codes_sha256="",
    )  # fmt: skip


@target("journal", "the journal of an interrupted run", mutation.json_lines)
def _journal(folder: Path) -> Prepared:
    return _interrupted(folder, "journal-0.jsonl")


@target("request", "what an interrupted run was asked for", mutation.json_document)
def _request(folder: Path) -> Prepared:
    return _interrupted(folder, "request.json")


@target("remembered", "the seed that an interrupted run drew", mutation.json_document)
def _remembered(folder: Path) -> Prepared:
    return _interrupted(folder, "seed.json")
