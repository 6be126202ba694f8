"""Small models of several shapes, saved as people save them, and where to find attacked ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from qcbguard_plugins.models.calibration import builtin_texts

transformers_logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 320


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of models that were made by other code carry a marker."""
    for item in items:
        if "shared_models" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.external)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the built-in text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(builtin_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _llama(**changes: object) -> LlamaConfig:
    settings: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def _gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )


def _mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )


SHAPES: dict[str, Callable[[], tuple[object, torch.dtype, str]]] = {
    "llama-fp32": lambda: (_llama(), torch.float32, "5GB"),
    "llama-bf16": lambda: (_llama(), torch.bfloat16, "5GB"),
    "llama-sharded": lambda: (_llama(), torch.float16, "100KB"),
    "llama-tied": lambda: (_llama(tie_word_embeddings=True), torch.float16, "5GB"),
    "gpt2": lambda: (_gpt2(), torch.float32, "5GB"),
    "mixtral": lambda: (_mixtral(), torch.bfloat16, "5GB"),
}
# Not for every test that goes over the shapes.
_MORE_SHAPES = {"llama-one-block": lambda: (_llama(num_hidden_layers=1), torch.float16, "100KB")}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Make a model of a named shape once, and return its folder."""
    made: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in made:
            config, dtype, max_shard_size = {**SHAPES, **_MORE_SHAPES}[shape]()
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).to(dtype)
            folder = tmp_path_factory.mktemp("models") / shape
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(folder)
            made[shape] = folder
        return made[shape]

    return make


@pytest.fixture
def llama(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama-fp32")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of the plain model that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Attacked models made by other code, kept beside the checkout on some machines."""
    folder = ROOT.parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("the attacked models made by other code are not on this machine")
    return folder
