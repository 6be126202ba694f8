"""What a load of a folder takes: the step that decides it, beside the real loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, modeling_utils

from qcbguard_plugins.checkpoint import open_checkpoint
from qcbguard_plugins.checkpoint.loaded_files import loaded_files, passed_over
from qcbguard_plugins.checkpoint.open_weights import open_weights
from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.models.loading import load_full_precision
from qcbguard_plugins.pipeline.plan import make_plan

DCP_SHARD = "shard-00000-model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def other_weights(folder: Path, name: str) -> Path:
    """A file of the same tensors with other values."""
    tensors = load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}
    for shard in folder.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def add_single_file(folder: Path) -> None:
    other_weights(folder, "all.safetensors").rename(folder / "model.safetensors")


def add_transformers_weights(folder: Path) -> None:
    other_weights(folder, "other.safetensors")
    change_config(folder, transformers_weights="other.safetensors")


def add_transformers_weights_in_a_folder(folder: Path) -> None:
    other_weights(folder, "sub/other.safetensors")
    change_config(folder, transformers_weights="sub/other.safetensors")


def add_adapter(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)


def add_listed_single_file(folder: Path) -> None:
    """An index of two files, one of which has the name of a whole checkpoint."""
    shard_of = json.loads((folder / INDEX).read_text())["weight_map"]
    first = sorted(set(shard_of.values()))[0]
    (folder / first).rename(folder / "model.safetensors")
    shard_of = {key: "model.safetensors" if shard == first else shard for key, shard in shard_of.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


def add_other_configuration(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.5.0.0.json")
    change_config(folder, configuration_files=["config.5.0.0.json"])


def rename_to_upper_case(folder: Path) -> None:
    other_weights(folder, "Model.safetensors")


# What an attacker or a careless upload can do, the shape it is done to, and the two files that must be named.
AMBIGUOUS: dict[str, tuple[str, Callable[[Path], Any], tuple[str, str]]] = {
    "a single file beside shards": ("llama-sharded", add_single_file, ("model.safetensors", INDEX)),
    "the index lists the single file": ("llama-sharded", add_listed_single_file, ("model.safetensors", INDEX)),
    "transformers_weights": ("llama-fp32", add_transformers_weights, ("other.safetensors", "model.safetensors")),
    "transformers_weights below": (
        "llama-fp32",
        add_transformers_weights_in_a_folder,
        ("sub/other.safetensors", "model.safetensors"),
    ),
    "an adapter": ("llama-fp32", add_adapter, ("adapter_config.json", "model.safetensors")),
    "an adapter beside shards": ("llama-sharded", add_adapter, ("adapter_config.json", INDEX)),
    "a distributed shard": (
        "llama-fp32",
        lambda folder: other_weights(folder, DCP_SHARD),
        (DCP_SHARD, "model.safetensors"),
    ),
    "a variant": (
        "llama-fp32",
        lambda folder: other_weights(folder, "model.fp16.safetensors"),
        ("model.fp16.safetensors", "model.safetensors"),
    ),
    "a shard that is not listed": (
        "llama-sharded",
        lambda folder: other_weights(folder, "model-00009-of-00009.safetensors"),
        ("model-00009-of-00009.safetensors", INDEX),
    ),
    "any other safetensors file": (
        "llama-fp32",
        lambda folder: other_weights(folder, "ema.safetensors"),
        ("ema.safetensors", "model.safetensors"),
    ),
    "upper and lower case": ("llama-fp32", rename_to_upper_case, ("Model.safetensors", "model.safetensors")),
    "another configuration": ("llama-fp32", add_other_configuration, ("config.json", "config.5.0.0.json")),
}


@pytest.fixture
def changed(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(shape: str) -> Path:
        return Path(shutil.copytree(model_folder(shape), tmp_path / "changed"))

    return make


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize(
    "entrance", [open_checkpoint, open_weights, lambda f: make_plan(f, "nf4"), lambda f: load_full_precision(f, None)]
)
def test_what_is_ambiguous_is_refused(
    name: str, entrance: Callable[[Path], object], changed: Callable[[str], Path]
) -> None:
    """Scan, guard, diff and verify open folders through these."""
    shape, change, files = AMBIGUOUS[name]
    folder = changed(shape)
    change(folder)
    with pytest.raises(CheckpointError, match="which weights will be loaded") as refused:
        entrance(folder)
    line = next(line for line in refused.value.details if all(file in line for file in files))
    assert "  " in line and "Keep the files of one model" in refused.value.remedy


class Opened(Exception):
    """Carries what the loader resolved out of the load."""


def files_that_transformers_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files that the real ``from_pretrained`` fills a model from, an adapter included."""
    found: set[str] = set()
    load = modeling_utils.PreTrainedModel._load_pretrained_model

    def spy(model: Any, state_dict: Any, checkpoint_files: Any, *arguments: Any, **keywords: Any) -> Any:
        found.update(str(Path(file).relative_to(folder)) for file in checkpoint_files or [])
        return load(model, state_dict, checkpoint_files, *arguments, **keywords)

    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_load_pretrained_model", staticmethod(spy))
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model._hf_peft_config_loaded:
        found.add("adapter_model.safetensors")
    return found


ATTACKS = [name for name in AMBIGUOUS if name.startswith(("a single", "the index", "transformers", "an adapter"))]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_loader_takes_other_files_where_we_refuse(
    name: str, changed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That these folders are no theory: the real loader does not take what the index or the plain name says."""
    shape, change, _ = AMBIGUOUS[name]
    folder = changed(shape)
    plain = set(loaded_files(folder).shards)
    change(folder)
    assert files_that_transformers_takes(folder, monkeypatch) != plain


def test_the_loader_takes_a_distributed_shard_first(llama: Path, changed: Callable[[str], Path]) -> None:
    from transformers.distributed.checkpoint import get_distributed_checkpoint_dir

    folder = changed("llama-fp32")
    assert get_distributed_checkpoint_dir(folder, "", None, None) is None
    other_weights(folder, DCP_SHARD)
    assert get_distributed_checkpoint_dir(folder, "", None, None) is not None


def add_nothing(folder: Path) -> None:
    pass


def add_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even opened")


def add_index_of_the_single_file(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def link_to_blobs(folder: Path) -> None:
    """As the hub's cache keeps its files."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))


# Folders that every loader reads alike, and the weight files in them that are named and left alone.
CLEAR: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...]]] = {
    "a single file": ("llama-fp32", add_nothing, ()),
    "shards": ("llama-sharded", add_nothing, ()),
    "a pickle beside it": ("llama-fp32", add_pickle, ("pytorch_model.bin",)),
    "an index of the single file": ("llama-fp32", add_index_of_the_single_file, ()),
    "links into the hub's cache": ("llama-sharded", link_to_blobs, ()),
    "weights in Mistral's format": (
        "llama-sharded",
        lambda folder: other_weights(folder, "consolidated.safetensors"),
        ("consolidated.safetensors",),
    ),
    "weights in a folder below": (
        "llama-fp32",
        lambda folder: other_weights(folder, "sub/model.safetensors"),
        ("sub/model.safetensors",),
    ),
    "an index in a folder below": (
        "llama-fp32",
        lambda folder: ((folder / "sub").mkdir(), (folder / "sub" / INDEX).write_text("{}")),
        (),
    ),
    "quantization_config is null": (
        "llama-fp32",
        lambda folder: change_config(folder, quantization_config=None),
        (),
    ),
    "transformers_weights is null": (
        "llama-fp32",
        lambda folder: change_config(folder, transformers_weights=None),
        (),
    ),
    "transformers_weights names the plain file": (
        "llama-fp32",
        lambda folder: change_config(folder, transformers_weights="model.safetensors"),
        (),
    ),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_clear_is_what_the_loader_takes(
    name: str, changed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, change, others = CLEAR[name]
    folder = changed(shape)
    change(folder)
    files = loaded_files(folder)
    assert set(files.shards) == files_that_transformers_takes(folder, monkeypatch)
    assert tuple(file.name for file in passed_over(folder)) == others
    assert open_checkpoint(folder).shards == files.shards


@pytest.mark.parametrize("section", [{}, {"text_config": {"quantization_config": {"quant_method": "gptq"}}}])
def test_what_is_quantized_in_a_part_of_the_model(section: dict[str, object], changed: Callable[[str], Path]) -> None:
    folder = changed("llama-fp32")
    change_config(folder, **section or {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CheckpointError, match="quantized already \\(quant_method gptq\\)"):
        open_checkpoint(folder)


def test_an_adapter_without_a_model(changed: Callable[[str], Path]) -> None:
    folder = changed("llama-fp32")
    add_adapter(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds an adapter and no model\n.*base model"):
        open_checkpoint(folder)


def test_the_names_are_those_of_transformers() -> None:
    from qcbguard_plugins.checkpoint import loaded_files as own

    assert transformers.utils.SAFE_WEIGHTS_NAME == own.SINGLE_FILE
    assert transformers.utils.SAFE_WEIGHTS_INDEX_NAME == own.INDEX_FILE
    assert transformers.utils.CONFIG_NAME == own.CONFIG_FILE
    assert transformers.utils.ADAPTER_CONFIG_NAME == own.ADAPTER_CONFIG_FILE
