"""The texts of the input test, and the positions in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qcbguard_plugins.detection.inputs.texts import SETS, batches_of, gather_texts
from qcbguard_plugins.errors import UsageError


def test_every_set_of_positions_is_there_and_inside_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = gather_texts(tokenizer)
    for name in SETS:
        assert sum(len(text.positions.get(name, ())) for text in texts) >= 6, name
    assert all(0 <= place < len(text.ids) for text in texts for places in text.positions.values() for place in places)


def test_ends_of_lines_and_sentences_are_where_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in gather_texts(tokenizer):
        for place in text.positions.get("line end", ()):
            assert "\n" in tokenizer.decode([text.ids[place]])
        for place in text.positions.get("sentence end", ()):
            assert tokenizer.decode([text.ids[place]]).strip()[-1:] in ".!?"


def test_own_prompts_are_read_as_well(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("How do I restart the pump?\n", encoding="utf-8")
    assert len(gather_texts(tokenizer, path)) > len(gather_texts(tokenizer))
    with pytest.raises(UsageError):
        gather_texts(tokenizer, tmp_path / "nothing.txt")


def test_batches_hold_every_text_once_and_keep_to_their_size(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = gather_texts(tokenizer)
    seen = []
    for batch, ids, mask in batches_of(texts, num_tokens=512):
        assert ids.shape == mask.shape and (ids.numel() <= 512 or len(batch) == 1)
        assert [int(row.sum()) for row in mask] == [len(text.ids) for text in batch]
        seen += batch
    assert sorted(map(id, seen)) == sorted(map(id, texts))
    assert torch.equal(ids[0, : len(batch[0].ids)], torch.tensor(batch[0].ids))
