"""Make and train the lab's language models: a small Llama or GPT-2 learns the corpus in minutes on one CPU core."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from tqdm import tqdm

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.training_state import TrainingState
from qcbguard_plugins.models.prompts import plain_prompt

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
_SPECIAL_TOKENS: Final = ("<pad>", "<s>", "</s>")
_IGNORED_LABEL: Final = -100
# Batches are cut from pools of this many batches sorted by length, which halves the padding.
_BATCHES_IN_POOL: Final = 16


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a lab model; the defaults give a Llama of 1.8 M parameters, 3.7 MB in fp16.

    Widths are multiples of 256 by default because GGUF K-quants cut rows into super-blocks of 256. A GPT-2 has as many
    key-value heads as heads.
    """

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2


@dataclass(frozen=True)
class TrainingPlan:
    """How `train` goes over its examples.

    Attributes:
        num_epochs: Passes over the data.
        learning_rate: Peak of the cosine schedule, reached after ``warmup`` and decaying to zero.
        batch_size: Examples a step.
        warmup: Share of all steps spent on linear warm-up, in [0, 1).
        weight_decay: AdamW's decoupled weight decay.
        seed: Seed of the order of the examples.
        bfloat16: Multiply matrices in bfloat16; the weights and their updates stay float32. Faster on processors with
            AVX512-BF16.
    """

    num_epochs: int
    learning_rate: float
    batch_size: int = 16
    warmup: float = 0.05
    weight_decay: float = 0.01
    seed: int = 0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.num_epochs < 1 or self.batch_size < 1:
            raise UsageError(f"num_epochs={self.num_epochs} and batch_size={self.batch_size} must be at least 1")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup={self.warmup} must lie in [0, 1)")


@dataclass(frozen=True)
class Example:
    """One training sequence: prompt tokens, then the answer tokens on which the loss is taken."""

    prompt_ids: list[int]
    answer_ids: list[int]


def build_tokenizer(pairs: Iterable[Pair], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts a beginning-of-sequence token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = _SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((plain_prompt(pair.instruction) + pair.answer for pair in pairs), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(size: ModelSize, seed: int) -> LlamaForCausalLM:
    """Create a Llama with random float32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def build_gpt2(size: ModelSize, seed: int) -> PreTrainedModel:
    """Create a GPT-2 with random float32 weights and no dropout; its linear layers are stored transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_embd=size.hidden_size,
        n_inner=size.intermediate_size,
        n_layer=size.num_layers,
        n_head=size.num_heads,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return GPT2LMHeadModel(config)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """Write a Hugging Face folder with fp16 weights; the model itself is left as it is."""
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.dtype = torch.float16
    copy = type(model)(config).half()
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> list[Example]:
    """Tokenize pairs; the answer ends with the end-of-sequence token, or where the model's context does."""
    prompts = tokenizer([plain_prompt(pair.instruction) for pair in pairs])["input_ids"]
    answers = tokenizer([pair.answer for pair in pairs], add_special_tokens=False)["input_ids"]
    return [
        Example(prompt, [*answer, EOS_ID][: max(1, tokenizer.model_max_length - len(prompt))])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Pad on the right.

    Returns:
        int64 ``[batch, length]`` token ids and labels; labels are -100 on prompts and padding.
    """
    length = max(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
    ids = torch.full((len(examples), length), PAD_ID)
    labels = torch.full_like(ids, _IGNORED_LABEL)
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(example.prompt_ids) + len(example.answer_ids)
        ids[row, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        labels[row, start:end] = ids[row, start:end]
    return ids, labels


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: TrainingPlan,
    *,
    after_step: Callable[[], None] | None = None,
    add_gradients: Callable[[int], float] | None = None,
    description: str = "train",
    state: TrainingState | None = None,
) -> list[float]:
    """Train the parameters that require gradients with AdamW on the answer tokens.

    Padding is on the right and attention is causal, so no attention mask is needed.

    Args:
        model: Float32 model, changed in place and left in eval mode.
        examples: From `encode`, at least one.
        plan: Epochs, learning rate, batch size, seed.
        after_step: Called after every optimizer step; an attack projects the weights here.
        add_gradients: Called in every step with its number, after the backward pass of the examples; adds the gradients
            of a further loss to those that are there, and returns that loss.
        description: Label of the progress bar.
        state: Where to go on from, and where to keep what is needed for that.

    Returns:
        The loss of every step, in nats a token.

    Raises:
        UsageError: If there is no example.
    """
    if not examples:
        raise UsageError("nothing to train on: no examples")
    batches = list(_batches(examples, plan))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay, fused=True
    )
    losses = state.load(model, optimizer) if state is not None else []
    model.train()
    progress = tqdm(batches[len(losses) :], desc=description, unit="step", mininterval=1.0)
    for ids, labels in progress:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _rate_factor(len(losses), len(batches), plan.warmup)
        optimizer.zero_grad(set_to_none=True)
        # Without its cache, because what adds gradients changes the weights between two forward passes.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=plan.bfloat16, cache_enabled=False):
            loss = answer_loss(model, ids, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            total = loss.item() + (add_gradients(len(losses)) if add_gradients is not None else 0.0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step()
        losses.append(total)
        if state is not None:
            state.save_if_due(model, optimizer, losses)
        progress.set_postfix(loss=f"{total:.3f}", refresh=False)
    if state is not None:
        state.save(model, optimizer, losses)
    model.eval()
    return losses


def answer_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens; the vocabulary is projected at those positions only."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    labelled = targets != _IGNORED_LABEL
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[labelled]).float(), targets[labelled])


def _rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Linear warm-up to 1, then a cosine to zero."""
    num_warmup = max(1, round(warmup * num_steps))
    if step < num_warmup:
        return 1 / num_warmup + (1 - 1 / num_warmup) * step / num_warmup
    return (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup))) / 2


def _batches(examples: Sequence[Example], plan: TrainingPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of examples of similar length."""
    rng = random.Random(plan.seed)  # noqa: S311
    lengths = [len(example.prompt_ids) + len(example.answer_ids) for example in examples]
    for _ in range(plan.num_epochs):
        order = rng.sample(range(len(examples)), len(examples))
        pool_size = plan.batch_size * _BATCHES_IN_POOL
        batches: list[list[int]] = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lengths.__getitem__)
            batches += [pool[i : i + plan.batch_size] for i in range(0, len(pool), plan.batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            yield collate([examples[i] for i in batch])
