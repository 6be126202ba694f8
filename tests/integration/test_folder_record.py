"""Whatever is added to a guarded folder or changed in it after guarding, the comparison names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qcbguard_plugins.checkpoint import hash_file
from qcbguard_plugins.checkpoint.folder_record import FolderRecord, compare_folder, loading_keys, record_folder

MANIFEST = "qcbguard.json"
WEIGHTS = "model.safetensors"
OWN = frozenset({MANIFEST})


@pytest.fixture
def recorded(folder: Path) -> tuple[Path, FolderRecord, dict[str, str]]:
    (folder / "README.md").write_text("a model")
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("")
    record = record_folder(folder, except_for=frozenset({WEIGHTS, MANIFEST}))
    (folder / MANIFEST).write_text("{}")
    return folder, record, {WEIGHTS: hash_file(folder / WEIGHTS)}


def set_key(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def write(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"something")

    return change


def link_a_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "linked").symlink_to(folder.parent / "elsewhere")


def link_a_file(folder: Path) -> None:
    (folder.parent / "evil.safetensors").write_bytes(b"something")
    (folder / "linked.safetensors").symlink_to(folder.parent / "evil.safetensors")


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight file": (write("model-00001-of-00001.safetensors"), "holds weights and is not of the guarded folder"),
    "a variant": (write("model.fp16.safetensors"), "holds weights"),
    "weights below": (write("sub/model.safetensors"), "holds weights"),
    "weights in a hidden folder": (write(".cache/model.safetensors"), "holds weights"),
    "a pickle": (write("pytorch_model.bin"), "holds weights"),
    "upper case": (write("MODEL.SAFETENSORS"), "holds weights"),
    "a gguf": (write("model.gguf"), "holds weights"),
    "an adapter": (write("adapter_config.json"), "can change what is loaded"),
    "an index": (write("model.safetensors.index.json"), "can change what is loaded"),
    "a pickle's index": (write("pytorch_model.bin.index.json"), "can change what is loaded"),
    "a quantization": (write("quantize_config.json"), "can change what is loaded"),
    "code": (write("modeling_evil.py"), "can change what is loaded"),
    "a module of sentence-transformers": (write("modules.json"), "can change what is loaded"),
    "changed weights": (write(WEIGHTS), "has changed since the folder was guarded"),
    "changed code": (write("code/modeling.py"), "has changed"),
    "a changed tokenizer": (write("tokenizer.json"), "has changed"),
    "missing weights": (lambda folder: (folder / WEIGHTS).unlink(), "is missing"),
    "a missing configuration": (lambda folder: (folder / "config.json").unlink(), "is missing"),
    "a linked folder": (link_a_folder, "a link to another folder"),
    "a linked file": (link_a_file, "holds weights"),
    "remote code": (
        set_key(auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "auto_map is {'AutoModelForCausalLM': 'evil.Model'}, and was None",
    ),
    "the weight file": (
        set_key(transformers_weights="other.safetensors"),
        "transformers_weights is 'other.safetensors'",
    ),
    "the class": (set_key(architectures=["MistralForCausalLM"]), "architectures is"),
    "the type": (set_key(model_type="mistral"), "model_type is 'mistral', and was 'llama'"),
    "the dtype": (set_key(dtype="bfloat16"), "dtype is 'bfloat16', and was 'float32'"),
    "the tie": (set_key(tie_word_embeddings=True), "tie_word_embeddings is True"),
    "a quantization_config": (set_key(quantization_config={"quant_method": "gptq"}), "quantization_config is"),
    "one of a part": (set_key(text_config={"dtype": "float16"}), "text_config.dtype is 'float16', and was None"),
    "any other key": (set_key(rope_theta=1.0), "has changed since the folder was guarded"),
    "no JSON": (write("config.json"), "has changed since the folder was guarded"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_changed_is_named(name: str, recorded: tuple[Path, FolderRecord, dict[str, str]]) -> None:
    folder, record, weights = recorded
    change, reason = ATTACKS[name]
    change(folder)
    problems = compare_folder(folder, record, weights, own=OWN)
    assert any(reason in problem for problem in problems), problems


def test_a_folder_as_it_was_made(recorded: tuple[Path, FolderRecord, dict[str, str]], tmp_path: Path) -> None:
    folder, record, weights = recorded
    assert compare_folder(folder, record, weights, own=OWN) == []
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert compare_folder(moved, record, weights, own=OWN) == []
    assert FolderRecord.model_validate_json(record.model_dump_json()) == record
    assert set(record.files) >= {"config.json", "tokenizer.json", "code/modeling.py"}
    assert not {WEIGHTS, MANIFEST, "README.md"} & set(record.files)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "verify.json", ".git/index.json", "notes.txt"])
def test_what_loads_nothing_may_be_added(name: str, recorded: tuple[Path, FolderRecord, dict[str, str]]) -> None:
    folder, record, weights = recorded
    write(name)(folder)
    assert compare_folder(folder, record, weights, own=OWN) == []


def test_null_says_what_absence_says() -> None:
    assert loading_keys({"quantization_config": None, "hidden_size": 8}) == {}
