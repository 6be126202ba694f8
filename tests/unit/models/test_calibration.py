"""Where calibration tokens come from."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlavaConfig, T5Config

from qcbguard_plugins.errors import CalibrationError, UncalibratableError, UsageError
from qcbguard_plugins.models.calibration import (
    Calibration,
    builtin_texts,
    calibration_tokens,
    fit_to_model,
    self_generated_tokens,
)
from qcbguard_plugins.models.loading import load_tokenizer
from qcbguard_plugins.models.text_pass import position_limit, table_limit

CONFIG = LlamaConfig(max_position_embeddings=64)
SENTENCES = [f"Sentence number {i} speaks of rivers, bridges and boats." for i in range(40)]


def tokens_of(calibration: Calibration, tokenizer: Any) -> torch.Tensor:
    tokens = calibration_tokens(calibration, CONFIG, tokenizer)
    assert tokens is not None
    return tokens


def test_the_builtin_text_holds_prose_and_code() -> None:
    passages = builtin_texts()
    assert len(passages) > 20
    assert all(passage.strip() for passage in passages)
    assert any("def " in passage for passage in passages)


def test_builtin_sequences_have_one_length_and_no_padding(tokenizer: Any) -> None:
    tokens = tokens_of(Calibration(num_sequences=12, sequence_length=256), tokenizer)
    assert tokens.shape == (12, CONFIG.max_position_embeddings)
    assert tokens.dtype == torch.int64
    assert not (tokens == tokenizer.pad_token_id).any()


def test_texts_may_be_strings_a_file_or_a_dataset(tokenizer: Any, tmp_path: Path) -> None:
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n".join(json.dumps({"body": text}) for text in SENTENCES))
    whole = tmp_path / "texts.txt"
    whole.write_text(SENTENCES[0] * 10)
    table = datasets.Dataset.from_dict({"body": SENTENCES})
    expected = tokens_of(Calibration(texts=SENTENCES), tokenizer)
    assert torch.equal(tokens_of(Calibration(texts=lines, text_field="body"), tokenizer), expected)
    assert torch.equal(tokens_of(Calibration(texts=table, text_field="body"), tokenizer), expected)
    assert tokens_of(Calibration(texts=str(whole)), tokenizer).numel() > 64


def test_texts_are_described_by_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one text")
    one = Calibration(texts=path).describe()["texts_sha256"]
    assert one == Calibration(texts=["one text"]).describe()["texts_sha256"]
    path.write_text("another")
    assert one != Calibration(texts=path).describe()["texts_sha256"]


def test_the_model_writes_where_there_is_no_tokenizer(model_folder: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama-fp32"))
    calibration = Calibration(num_sequences=5, sequence_length=40)
    assert calibration_tokens(calibration, model.config, None) is None
    tokens = self_generated_tokens(calibration, model, seed=3)
    assert tokens.shape == (5, 40)
    assert torch.equal(tokens, self_generated_tokens(calibration, model, seed=3))
    assert not torch.equal(tokens, self_generated_tokens(calibration, model, seed=4))
    assert (tokens[:, 0] == model.config.bos_token_id).all()


def test_self_generation_leaves_the_callers_randomness_alone(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    self_generated_tokens(Calibration(num_sequences=1, sequence_length=16), model, seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"source": "web"}, "unknown calibration source"),
        ({"source": "texts"}, "it needs them"),
        ({"source": "self", "texts": ["a"]}, "go with the source"),
        ({"num_sequences": 0}, "at least one sequence"),
        ({"sequence_length": 3}, "at least one sequence"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Calibration(**arguments)


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        ("too short", "t.txt", "at least 16"),
        ('{"text": 3}', "t.jsonl", "line 1: no string under 'text'"),
        ('{"text": "a"}\n{broken', "t.jsonl", "line 2"),
        ("[1]", "t.jsonl", "line 1: no string"),
    ],
)
def test_unusable_text_is_refused(content: str, name: str, reason: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=reason):
        calibration_tokens(Calibration(texts=tmp_path / name), CONFIG, tokenizer)


def test_missing_binary_or_foreign_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    for texts in (tmp_path / "none.txt", tmp_path / "b.txt", [], [1, 2]):
        with pytest.raises(CalibrationError):
            calibration_tokens(Calibration(texts=texts), CONFIG, tokenizer)
    with pytest.raises(CalibrationError, match="no column 'text'"):
        calibration_tokens(Calibration(texts=datasets.Dataset.from_dict({"body": ["a"]})), CONFIG, tokenizer)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CalibrationError, match="needs the model's tokenizer"):
        calibration_tokens(Calibration(source="builtin"), CONFIG, None)


def test_sequences_fit_the_positions_that_a_model_has() -> None:
    """RoBERTa and its relatives count positions from behind the padding token."""
    plain, behind = nn.Module(), nn.Module()
    plain.position_embeddings = nn.Embedding(34, 8)
    behind.position_embeddings = nn.Embedding(34, 8, padding_idx=1)
    assert (table_limit(plain), table_limit(behind), table_limit(nn.Linear(2, 2))) == (34, 32, None)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=40), 40),
        (GPT2Config(n_positions=50), 50),
        (T5Config(), None),
        (LlavaConfig(text_config=LlamaConfig(max_position_embeddings=30)), 30),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_limit_of_a_configuration_is_found_under_any_of_its_names(config: Any, limit: int | None) -> None:
    assert position_limit(config) == limit


def test_a_short_context_is_no_lack_of_text(tokenizer: Any) -> None:
    tokens = calibration_tokens(Calibration(num_sequences=4), LlamaConfig(max_position_embeddings=8), tokenizer)
    assert tokens is not None
    assert tokens.shape == (4, 8)


def test_ids_beyond_the_models_rows_are_named(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(UncalibratableError, match="ids up to 9999, and LlamaForCausalLM has 320 rows"):
        fit_to_model(torch.full((1, 8), 9999), model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "bert", "clip"])
def test_a_folder_without_tokenizer_files_has_no_tokenizer(model_type: str, tmp_path: Path) -> None:
    """transformers 5 makes one without a vocabulary of the model type alone."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None


def test_a_tokenizer_is_not_looked_for_in_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_tokenizer("some-owner/some-model") is None
