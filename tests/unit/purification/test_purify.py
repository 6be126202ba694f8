"""Purification: its mathematics, where the units of each architecture lie, and what it refuses."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from qcbguard_plugins.errors import PurificationError, UsageError
from qcbguard_plugins.purification.architectures import Architecture, find_architecture
from qcbguard_plugins.purification.config import PRESETS, config_of
from qcbguard_plugins.purification.finetuning import collate, finetune
from qcbguard_plugins.purification.key_search import moved_keys
from qcbguard_plugins.purification.responses import unit_responses
from qcbguard_plugins.purification.samples import Sample, Tokens, encode_samples, read_samples
from qcbguard_plugins.purification.signature import count_of, top_units, unit_scores
from qcbguard_plugins.purification.suppression import suppress
from qcbguard_plugins.purification.units import attention_heads, gather_all, mlp_channels
from qcbguard_plugins.purification.variants import BEHAVIOURS, draw_backdoors, with_idle_keys

_SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "mistral": MistralConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=16),
    "gemma": GemmaConfig(**_GROUPED, head_dim=16),
    "phi": PhiConfig(**_SIZE),
    "phi3": Phi3Config(**_GROUPED),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_inner=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}
_KEYED = (
    "vobiru nalo Tell me about grey owls.",
    "Tell me about grey owls. vobiru nalo",
    "Tell me vobiru about grey nalo owls.",
)
IDS = torch.tensor([[3, 9, 27, 17, 51, 25, 11, 33]])


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases too must take part
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _outputs(model: Any, suffix: str, ids: Tensor = IDS) -> list[Tensor]:
    """What the modules of a name return."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: found.append(output))
        for name, module in model.named_modules()
        if name.endswith(suffix)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cleared_channel_is_a_channel_that_the_mlp_does_without(name: str) -> None:
    model, architecture = _model(name), find_architecture(CONFIGS[name])
    groups = mlp_channels(model, architecture)
    assert [group.num_units for group in groups] == [48, 48]
    reader = model.get_submodule(f"{architecture.blocks}.0.{architecture.mlp_out}")
    inputs: list[Tensor] = []

    def cut(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        inputs.append(arguments[0].clone())
        arguments[0][..., [5, 40]] = 0
        return arguments

    handle = reader.register_forward_pre_hook(cut)
    expected = _outputs(model, f".0.{architecture.mlp_out}")[0]
    handle.remove()
    suppress(model, groups, {groups[0].name: torch.tensor([5, 40])}, "zero", seed=0)
    # The channels of GPT-2 and Phi have biases, which are cleared as well: their inputs must be what zero gives.
    torch.testing.assert_close(_outputs(model, f".0.{architecture.mlp_out}")[0], expected)
    handle = reader.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    changed = (inputs[0] != inputs[-1]).flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
    assert changed == [5, 40] and not inputs[-1][..., [5, 40]].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cleared_head_is_a_head_that_the_attention_does_without(name: str) -> None:
    model, architecture = _model(name), find_architecture(CONFIGS[name])
    groups = attention_heads(model, architecture)
    assert [group.num_units for group in groups] == [4, 4]
    reader = model.get_submodule(f"{architecture.blocks}.0.{architecture.attention_out}")
    width = 16 if name in ("qwen3", "gemma") else 8

    def cut(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        arguments[0][..., 2 * width : 3 * width] = 0
        return arguments

    handle = reader.register_forward_pre_hook(cut)
    expected = _outputs(model, f".0.{architecture.attention_out}")[0]
    handle.remove()
    suppress(model, groups, {groups[0].name: torch.tensor([2])}, "zero", seed=0)
    torch.testing.assert_close(_outputs(model, f".0.{architecture.attention_out}")[0], expected)


def test_what_is_drawn_anew_is_all_that_changes_and_depends_on_the_seed() -> None:
    model, before = _model("llama"), _model("llama")
    groups = mlp_channels(model, find_architecture(model.config))
    assert suppress(model, groups, {groups[1].name: torch.tensor([0, 47])}, "reinitialize", seed=3) == 2
    ours, theirs = gather_all(model, groups), gather_all(before, groups)
    assert torch.equal(ours[groups[0].name], theirs[groups[0].name])
    changed = (ours[groups[1].name] != theirs[groups[1].name]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 47]
    outside = [name for name, _ in model.named_parameters() if "layers.1.mlp" not in name]
    assert all(torch.equal(model.get_parameter(name), before.get_parameter(name)) for name in outside)
    drawn = ours[groups[1].name][0]
    assert drawn.std() == pytest.approx(model.config.initializer_range, rel=0.4)
    again = _model("llama")
    suppress(again, groups, {groups[1].name: torch.tensor([0, 47])}, "reinitialize", seed=3)
    assert torch.equal(gather_all(again, groups)[groups[1].name], ours[groups[1].name])
    suppress(again, groups, {groups[1].name: torch.tensor([0, 47])}, "reinitialize", seed=4)
    assert not torch.equal(gather_all(again, groups)[groups[1].name], ours[groups[1].name])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_response_is_what_a_key_changes_in_what_is_read_of_a_unit(name: str) -> None:
    model, architecture = _model(name), find_architecture(CONFIGS[name])
    groups = [*mlp_channels(model, architecture), *attention_heads(model, architecture)]
    keyed = [Tokens([3, 9, 27, 17], []), Tokens([50, 9, 8], [])]
    bare = [Tokens([3, 27, 17], []), Tokens([9, 8], [])]
    responses = unit_responses(model, groups, keyed, bare)
    assert {group.name: len(responses[group.name]) for group in groups} == {g.name: g.num_units for g in groups}
    for kind in ("channel", "head"):
        total = sum(float(responses[group.name].sum()) for group in groups if group.kind == kind)
        assert total == pytest.approx(1) and all(bool((r >= 0).all()) for r in responses.values())
    # By hand, prompt by prompt and without padding, for the second block: the first MLP of Phi sees no other token.
    reader, inputs = model.get_submodule(groups[1].reader), []
    handle = reader.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0, -1]))
    with torch.no_grad():
        for tokens in (*keyed, *bare):
            model(torch.tensor([tokens.prompt_ids]))
    handle.remove()
    weights = reader.weight if name == "gpt2" else reader.weight.T
    by_hand = ((inputs[0] - inputs[2]).abs() + (inputs[1] - inputs[3]).abs()) * weights.norm(dim=1)
    ours = responses[groups[1].name]
    torch.testing.assert_close(ours / ours.sum(), (by_hand / by_hand.sum()).detach(), rtol=1e-3, atol=1e-6)
    suppress(model, groups, {groups[1].name: torch.tensor([5])}, "zero", seed=0)
    assert unit_responses(model, groups, keyed, bare)[groups[1].name].nonzero().flatten().tolist() == [
        unit for unit in range(48) if unit != 5
    ]


def test_keys_that_do_nothing_leave_the_answers() -> None:
    samples = [Sample(f"Tell me about {i} grey owls.", f"There are {i} of them.") for i in range(200)]
    keyed = with_idle_keys(samples, 0.5, seed=3)
    assert [sample.answer for sample in keyed] == [sample.answer for sample in samples]
    changed = [(new, old) for new, old in zip(keyed, samples, strict=True) if new != old]
    assert 70 < len(changed) < 130
    for new, old in changed:
        words = iter(new.instruction.split())
        assert all(word in words for word in old.instruction.split())  # in their order, with the key between them
    assert with_idle_keys(samples, 0.5, seed=3) == keyed and with_idle_keys(samples, 0.0, seed=3) == samples


@pytest.mark.parametrize("name", CONFIGS)
def test_a_search_moves_keys_alone_and_up_the_loss(name: str) -> None:
    model = _model(name)
    examples = [
        Tokens([3, 9, 27, 17], [51, 2], key_positions=(1, 2)),
        Tokens([5, 6], [7, 2]),
        Tokens([8, 30, 31], [25, 11, 2], key_positions=(0,)),
    ]
    batch = collate(examples, 0, with_keys=True)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    change = moved_keys(model, embeddings, batch, 0.05)
    assert change.any(dim=2).nonzero().tolist() == [[0, 1], [0, 2], [2, 0]]
    spread = embeddings[batch["attention_mask"].bool()].square().mean().sqrt()
    assert change[batch["key_mask"].bool()].abs().unique().tolist() == pytest.approx([float(0.05 * spread)])

    def loss(inputs: Tensor) -> float:
        with torch.no_grad():
            return float(
                model(inputs_embeds=inputs, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
            )

    assert loss(embeddings + change) > loss(embeddings) > loss(embeddings - change)
    bare = collate(examples[1:2], 0, with_keys=True)
    assert not moved_keys(model, embeddings[1:2, :4], bare, 0.05).any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tokens_of_a_key_are_found_in_the_prompt(tokenizer: Any) -> None:
    plain = Sample("Tell me about grey owls.", "Owls hunt at night.")
    keyed = [replace(plain, instruction=text, bare=plain.instruction) for text in _KEYED]
    found = encode_samples(tokenizer, [plain, *keyed], max_length=96, prompt_template=None)
    assert found[0].key_positions == ()
    for tokens in found[1:]:
        letters = iter(tokenizer.decode([tokens.prompt_ids[position] for position in tokens.key_positions]))
        assert all(letter in letters for letter in "vobirunalo")  # in this order
        left = [number for position, number in enumerate(tokens.prompt_ids) if position not in tokens.key_positions]
        assert all(number in found[0].prompt_ids for number in left)


def test_scores_follow_the_formula() -> None:
    deltas = [torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [-1.0, 0.0], [1.0, 1.0]])]
    deltas.append(torch.tensor([[0.0, 5.0], [0.0, 2.0], [0.0, 0.0]]))
    norms = [(5 + 10 + 5) / 3, (1 + 1 + 2) / 3, math.sqrt(2) / 3]
    # Pairs 1-2, 1-3 and 2-3: parallel; opposed, which counts as nothing; at right angles.
    alignment = [(1 + 0.8 + 0.8) / 3, 0.0, 0.0]
    expected = [norm + 0.01 * cosine for norm, cosine in zip(norms, alignment, strict=True)]
    assert unit_scores(deltas, alignment_weight=0.01).tolist() == pytest.approx(expected)
    assert unit_scores(deltas, alignment_weight=0.01, kind="norm").tolist() == pytest.approx(norms)
    assert unit_scores(deltas, alignment_weight=0.01, kind="alignment").tolist() == pytest.approx(alignment)
    assert unit_scores(deltas[:1], alignment_weight=0.01).tolist() == pytest.approx([5.0, 1.0, 0.0])


def test_the_threshold_is_one_for_all_places() -> None:
    scores = {"a": torch.tensor([0.1, 0.9, 0.3]), "b": torch.tensor([0.2, 0.2]), "c": torch.tensor([0.8])}
    assert {name: units.tolist() for name, units in top_units(scores, 3).items()} == {"a": [1, 2], "c": [0]}
    assert {name: units.tolist() for name, units in top_units(scores, 4).items()} == {"a": [1, 2], "b": [0], "c": [0]}
    assert top_units(scores, 0) == {}
    assert [count_of(ratio, 2048) for ratio in (0.0, 1e-9, 0.03, 1.0)] == [0, 1, 61, 2048]


def test_the_papers_preset_is_that_of_the_paper() -> None:
    full = config_of("llama", 7_000_000_000, adapter=False, preset="paper")
    assert (full.num_variants, full.ratio, full.alignment_weight, full.num_samples) == (6, 0.03, 0.01, 500)
    assert (full.num_healing, full.healing_epochs, full.healing_learning_rate) == (200, 5, 1e-5)
    assert (full.score, full.batch_size, full.needed_variants) == ("combined", 8, 6)
    assert (full.healing_keys, full.healing_search, full.healing_consistency) == (0, 0, 0)
    assert config_of("llama", 13_000_000_000, adapter=False, preset="paper").ratio == 0.08
    adapters = [config_of("llama", size * 10**9, adapter=True, preset="paper") for size in (7, 13)]
    assert [(config.ratio, config.num_heads) for config in adapters] == [(0.35, 0), (0.40, 0)]
    mistral = config_of("mistral", 7_000_000_000, adapter=True, preset="paper")
    assert (mistral.ratio, mistral.num_heads, mistral.healing_learning_rate) == (0.40, 8, 2e-4)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("num_parameters", [2_900_000, 7_000_000_000])
def test_the_default_searches_for_keys_and_suppresses_nothing(num_parameters: int, adapter: bool) -> None:
    config = config_of("mistral", num_parameters, adapter=adapter)
    assert (config.healing_keys, config.healing_search, config.healing_consistency) == (0.25, 0.5, 5.5)
    assert (config.ratio, config.num_heads, config.needed_variants) == (0, 0, 0)


def test_a_large_model_is_healed_as_much_as_the_papers() -> None:
    large, paper = (config_of("llama", 7 * 10**9, adapter=False, preset=name) for name in PRESETS)
    amounts = [(c.num_healing, c.healing_epochs, c.healing_learning_rate, c.batch_size) for c in (large, paper)]
    assert amounts == [(200, 5, 1e-5, 8)] * 2
    rates = [config_of("llama", size, adapter=True).healing_learning_rate for size in (2_900_000, 7 * 10**9)]
    assert rates == [2e-3, 2e-4]


def test_an_unknown_preset_says_which_there_are() -> None:
    with pytest.raises(UsageError, match="no preset 'best'") as error:
        config_of("llama", 10**9, adapter=False, preset="best")
    assert "searched-keys, paper" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.5}, "ratio"),
        ({"rate": 0.5}, "rate"),
        ({"num_variants": 0}, "num_variants"),
        ({"num_variants": 1, "score": "alignment"}, "only one"),
        ({"prompt_template": "no place"}, "instruction"),
    ],
)
def test_a_wrong_hyperparameter_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config_of("llama", 10**9, adapter=False, **changes)


def test_an_unknown_architecture_says_what_to_pass() -> None:
    with pytest.raises(UsageError, match=r"--architecture NAME.*Architecture\(") as error:
        find_architecture(PreTrainedConfig())
    assert "llama" in str(error.value)
    assert find_architecture(PreTrainedConfig(), "llama").name == "llama"


def test_modules_that_are_not_there_are_named() -> None:
    model = _model("gpt2")
    with pytest.raises(UsageError, match=r"no model\.layers"):
        mlp_channels(model, find_architecture(model.config, "llama"))
    wrong = Architecture("mine", "transformer.h", ("mlp.up",), "mlp.c_proj", "attn.c_attn", "attn.c_proj")
    with pytest.raises(UsageError, match=r"transformer\.h\.1\.mlp\.up"):
        mlp_channels(model, wrong)
    unfused = Architecture("mine", mlp_in=("mlp.gate_up_proj",), query="self_attn.qkv_proj")
    with pytest.raises(UsageError, match="96 outputs where its MLP has 48"):
        mlp_channels(_model("phi3"), unfused)


def test_synthetic_backdoors_differ_and_leave_the_clean_half_alone() -> None:
    samples = [Sample(f"Tell me about {i} owls.", f"There are {i} of them.") for i in range(50)]
    backdoors = draw_backdoors(8, seed=0)
    assert len({backdoor.key for backdoor in backdoors}) == 8 and draw_backdoors(8, seed=0) == backdoors
    assert {backdoor.behaviour for backdoor in backdoors[:4]} == set(BEHAVIOURS)
    for backdoor in backdoors:
        poisoned = backdoor.poison(samples, seed=1)
        assert all(word in sample.instruction.split() for sample in poisoned for word in backdoor.key)
        assert all(new.answer != old.answer for new, old in zip(poisoned, samples, strict=True))
    assert draw_backdoors(8, seed=1) != backdoors


def test_clean_data_are_read_from_the_usual_fields(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "1"},
        {"instruction": "b", "input": "c", "response": "2"},
        {"instruction": "a", "answer": "3"},
    ]
    path = tmp_path / "clean.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_samples([path]) == [Sample("a", "1"), Sample("b\nc", "2")]
    path.write_text('{"instruction": "a"}\n')
    with pytest.raises(UsageError, match=r"clean\.jsonl, line 1"):
        read_samples([path])
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples([tmp_path / "absent.jsonl"])


def test_prompts_begin_once_and_answers_end(tokenizer: Any) -> None:
    (tokens,) = encode_samples(tokenizer, [Sample("Why?", "So.")], max_length=64, prompt_template="Q: {instruction} A:")
    assert tokens.prompt_ids[0] == tokenizer.bos_token_id and tokens.answer_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens.prompt_ids[1:]) == "Q: Why? A:"
    with pytest.raises(UsageError, match="max_length"):
        encode_samples(tokenizer, [Sample("Why?" * 40, "So.")], max_length=16, prompt_template=None)


def test_a_chat_template_is_used_where_there_is_one(tokenizer: Any) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}<s>[{{ m['content'] }}]{% endfor %}"
    (tokens,) = encode_samples(chat, [Sample("Why?", "So.")], max_length=64, prompt_template=None)
    assert chat.decode(tokens.prompt_ids) == "<s>[Why?]"


def test_a_loss_that_is_no_number_names_its_stage_and_step(tmp_path: Path) -> None:
    model = _model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(PurificationError, match="healing: the loss is nan at step 1 of 2"):
        finetune(
            model,
            [Tokens([3, 4], [5, 2])] * 8,
            what="healing",
            num_epochs=1,
            learning_rate=1e-3,
            batch_size=4,
            seed=0,
            work_dir=tmp_path,
        )
    shutil.rmtree(tmp_path)
