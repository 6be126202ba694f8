"""Where calibration tokens come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qcbguard_plugins.errors import CalibrationError, UsageError
from qcbguard_plugins.models.calibration import Calibration, builtin_texts, calibration_tokens, self_generated_tokens

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
