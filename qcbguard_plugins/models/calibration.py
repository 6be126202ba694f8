"""Token sequences for methods that look at a model's inputs.

Three sources: a small text of our own that ships with the package, the user's texts, and text that the model itself
writes. The sequences need not resemble the task; a handful is enough.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcbguard_plugins._util.json_lines import read_json_lines
from qcbguard_plugins.errors import CalibrationError, UncalibratableError, UsageError
from qcbguard_plugins.models.text_pass import one_line, position_limit, table_limit

_PASSAGE_SEPARATOR = "\n%%\n"
_MIN_TOKENS = 16
_SOURCES = ("auto", "builtin", "self", "texts")


@dataclass(frozen=True)
class Calibration:
    """Where calibration text comes from, and how much of it is used.

    Attributes:
        source: ``builtin`` (the package's text), ``texts`` (the user's), ``self`` (written by the model, which needs no
            tokenizer), or ``auto``: ``texts`` where given, else ``builtin`` where there is a tokenizer, else ``self``.
        texts: Strings; the path of a ``.txt`` file, or of a ``.jsonl`` file with a string under ``text_field`` in each
            line; or a ``datasets.Dataset`` with such a column.
        text_field: Name of that field.
        num_sequences: Number of sequences, at most.
        sequence_length: Tokens in each, at most; a model's own limit is kept.
    """

    source: str = "auto"
    texts: Any = None
    text_field: str = "text"
    num_sequences: int = 64
    sequence_length: int = 256

    def __post_init__(self) -> None:
        if self.source not in _SOURCES:
            raise UsageError(f"unknown calibration source {self.source!r}", remedy=f"Sources: {', '.join(_SOURCES)}.")
        if (self.source == "texts") != (self.texts is not None) and self.source != "auto":
            raise UsageError("calibration texts go with the source 'texts', and it needs them")
        if self.num_sequences < 1 or self.sequence_length < _MIN_TOKENS:
            raise UsageError(f"calibration needs at least one sequence of {_MIN_TOKENS} tokens")

    def resolve(self, has_tokenizer: bool) -> str:
        """The source that ``auto`` stands for.

        Raises:
            CalibrationError: The source needs a tokenizer and there is none.
        """
        source = self.source
        if source == "auto":
            source = "texts" if self.texts is not None else "builtin" if has_tokenizer else "self"
        if source != "self" and not has_tokenizer:
            raise CalibrationError(
                f"calibration from {source} text needs the model's tokenizer, and it cannot be loaded",
                remedy="Put the tokenizer files beside the model, calibrate with the source 'self', or use a method "
                "that needs no calibration, such as stochastic.",
            )
        return source

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values; texts are named by their hash."""
        texts = None
        if self.texts is not None:
            digest = hashlib.sha256()
            for text in _user_texts(self.texts, self.text_field):
                digest.update(text.encode() + b"\0")
            texts = digest.hexdigest()
        return {
            "source": self.source,
            "texts_sha256": texts,
            "num_sequences": self.num_sequences,
            "sequence_length": self.sequence_length,
        }


def builtin_texts() -> list[str]:
    """The passages of the package's own text, prose and code."""
    text = resources.files("qcbguard_plugins").joinpath("models/calibration_text.txt").read_text(encoding="utf-8")
    return text.strip().split(_PASSAGE_SEPARATOR)


def calibration_tokens(calibration: Calibration, config: Any, tokenizer: Any) -> Tensor | None:
    """Make the sequences from text.

    Args:
        calibration: The settings.
        config: The model's configuration, for its limit on the sequence length.
        tokenizer: Its tokenizer, or ``None``.

    Returns:
        int64 ``[num_sequences, sequence_length]``, all of one length, nothing padded; ``None`` where the model is to
        write the text itself (:func:`self_generated_tokens`).

    Raises:
        CalibrationError: There is no usable text, or no tokenizer to read it with.
    """
    source = calibration.resolve(has_tokenizer=tokenizer is not None)
    if source == "self":
        return None
    texts = builtin_texts() if source == "builtin" else _user_texts(calibration.texts, calibration.text_field)
    return _cut(texts, tokenizer, calibration.num_sequences, _sequence_length(calibration, config))


def _sequence_length(calibration: Calibration, config: Any) -> int:
    return min(calibration.sequence_length, position_limit(config) or calibration.sequence_length)


def fit_to_model(tokens: Tensor, model: Any) -> Tensor:
    """The sequences, cut to the positions that a model has.

    Raises:
        UncalibratableError: The tokenizer gives ids that the model has no row for.
    """
    limit = table_limit(model)
    tokens = tokens if limit is None else tokens[:, :limit].contiguous()
    table = _table(model)
    if table is not None and int(tokens.max()) >= table.num_embeddings:
        raise UncalibratableError(
            f"the tokenizer gives ids up to {int(tokens.max())}, and {type(model).__name__} has "
            f"{table.num_embeddings} rows"
        )
    return tokens


def _table(model: Any) -> nn.Embedding | None:
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # models of sound and of pictures have none
        return None
    return table if isinstance(table, nn.Embedding) else None


def _cut(texts: Iterable[str], tokenizer: Any, num_sequences: int, length: int) -> Tensor:
    """Join the tokens of the texts and cut them into sequences of one length."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= num_sequences * length:
            break
    if len(ids) < _MIN_TOKENS:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens; at least {_MIN_TOKENS} are needed", remedy="Give more text."
        )
    length = min(length, len(ids))
    count = min(num_sequences, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def _user_texts(texts: Any, field: str) -> Sequence[str]:
    if isinstance(texts, (str, Path)):
        return _read_texts(Path(texts), field)
    if hasattr(texts, "column_names"):
        if field not in texts.column_names:
            raise CalibrationError(f"the calibration dataset has no column {field!r}: {', '.join(texts.column_names)}")
        texts = texts[field]
    found = list(texts)
    if not found or not all(isinstance(text, str) for text in found):
        raise CalibrationError("calibration texts must be strings, at least one")
    return found


def _read_texts(path: Path, field: str) -> list[str]:
    if path.suffix != ".jsonl":
        try:
            return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"calibration text {path} cannot be read: {error}") from error
    texts = []
    for number, row in read_json_lines(path, CalibrationError, "calibration text"):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise CalibrationError(f"{path.name}, line {number}: no string under {field!r}")
        texts.append(row[field])
    return texts


@torch.no_grad()
def self_generated_tokens(calibration: Calibration, model: Any, *, seed: int) -> Tensor:
    """Let the model write the sequences: each starts from the start token and a random token.

    Args:
        calibration: The settings.
        model: A causal language model of transformers, in full precision.
        seed: Seed of the sampling.

    Returns:
        int64 ``[num_sequences, sequence_length]`` on the model's device.

    Raises:
        UncalibratableError: The model cannot write.
    """
    table = _table(model)
    if table is None or not callable(getattr(model, "generate", None)) or not model.can_generate():
        raise UncalibratableError(f"{type(model).__name__} has no tokenizer beside it and cannot write text itself")
    device = next(model.parameters()).device
    length = min(_sequence_length(calibration, model.config), table_limit(model) or calibration.sequence_length)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        prompt = torch.randint(table.num_embeddings, (calibration.num_sequences, 1), device=device)
        bos = getattr(model.config, "bos_token_id", None)
        if isinstance(bos, int):
            prompt = torch.cat([torch.full_like(prompt, bos), prompt], dim=1)
        try:
            written: Tensor = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_length=length,
                max_length=length,
                do_sample=True,
                temperature=1.0,
                top_k=50,
                top_p=1.0,
                pad_token_id=0,
            )
        except Exception as error:  # a model may break in any way, by numbers that its dtype cannot hold among others
            raise UncalibratableError(
                f"{type(model).__name__} has no tokenizer beside it and breaks when it writes ({one_line(error)})"
            ) from error
    return written[:, :length].contiguous()
