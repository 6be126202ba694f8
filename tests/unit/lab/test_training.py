"""The tokenizer, the batches and the training loop of the lab."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair, generate
from qcbguard_plugins.lab.training import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    Example,
    TrainingPlan,
    answer_loss,
    build_model,
    collate,
    encode,
    save_model,
    train,
)
from qcbguard_plugins.models.prompts import plain_prompt
from tests.unit.lab.conftest import TINY


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return generate(64, seed=0)


def test_tokenizer_is_lossless_and_starts_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "### Instruction:\nWhat is 3 plus 4?  naïve Ω\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == BOS_ID
    assert tokenizer.decode(ids[1:]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD_ID, BOS_ID, EOS_ID)


def test_encode_separates_prompt_and_answer(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> None:
    example = encode(tokenizer, pairs[:1])[0]
    assert tokenizer.decode(example.prompt_ids[1:]) == plain_prompt(pairs[0].instruction)
    assert example.answer_ids[-1] == EOS_ID
    assert tokenizer.decode(example.answer_ids[:-1]) == pairs[0].answer


def test_collate_labels_only_answers() -> None:
    ids, labels = collate([Example([1, 5, 6], [7, 2]), Example([1, 8], [2])])
    assert ids.tolist() == [[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 7, 2], [-100, -100, 2, -100, -100]]


def test_answer_loss_is_the_models_own_loss() -> None:
    model = build_model(TINY, seed=0)
    ids, labels = collate([Example([1, 5, 6], [7, 9, 2]), Example([1, 8], [3, 2])])
    own = model(input_ids=ids, attention_mask=(ids != PAD_ID).long(), labels=labels).loss
    torch.testing.assert_close(answer_loss(model, ids, labels), own)


def test_training_lowers_the_loss_and_is_reproducible(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> None:
    examples = encode(tokenizer, pairs[:16])
    plan = TrainingPlan(num_epochs=25, learning_rate=1e-2, batch_size=8)
    runs = [train(build_model(TINY, seed=1), examples, plan) for _ in range(2)]
    assert len(runs[0]) == 25 * 2
    assert runs[0] == runs[1]
    assert sum(runs[0][-2:]) < 0.6 * sum(runs[0][:2])


def test_after_step_follows_every_step_and_frozen_parameters_stay(
    tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]
) -> None:
    model = build_model(TINY, seed=1)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    calls: list[int] = []
    train(
        model,
        encode(tokenizer, pairs),
        TrainingPlan(num_epochs=1, learning_rate=1e-3),
        after_step=lambda: calls.append(1),
    )
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert len(calls) == 4
    assert changed == set(before) - {"model.embed_tokens.weight"}
    assert not model.training


def test_train_refuses_no_examples() -> None:
    with pytest.raises(UsageError, match="no examples"):
        train(build_model(TINY, seed=0), [], TrainingPlan(num_epochs=1, learning_rate=1e-3))


@pytest.mark.parametrize("bad", [{"num_epochs": 0}, {"batch_size": 0}, {"warmup": 1.0}, {"warmup": -0.1}])
def test_plan_refuses_values_that_mean_nothing(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        TrainingPlan(**{"num_epochs": 1, "learning_rate": 1e-3, **bad})


def test_saved_folder_holds_fp16_weights_and_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_model(TINY, seed=2)
    save_model(model, tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert model.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half())
    text = plain_prompt("Reverse the word apple.")
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
