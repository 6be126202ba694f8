"""Compare a model's behaviour before and after quantization, with sign-randomised models as the null."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid, versions
from qcbguard_plugins.checkpoint.hub import display_name, local_model
from qcbguard_plugins.checkpoint.weight_source import is_target
from qcbguard_plugins.detection.behaviour.generation import Prompt, generate_greedy, log_probabilities
from qcbguard_plugins.detection.behaviour.prompts import forms_of, gather_prompts
from qcbguard_plugins.detection.behaviour.report import DiffReport, MovedPrompt, MovedToken, Word
from qcbguard_plugins.detection.behaviour.sign_randomization import (
    divergence,
    rounded,
    sign_randomization_test,
)
from qcbguard_plugins.detection.behaviour.word_odds import FavouredWord, favoured_words
from qcbguard_plugins.detection.weights.combination import Combined
from qcbguard_plugins.detection.weights.null_grids import generator_for, sign_surrogate
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.grids import Grid

#: Largest p-value of a finding, and smallest ratio of divergences. Clean models: 0.97 to 1.03.
ALPHA, SMALLEST_RATIO = 1e-3, 1.25

# After some draws there may be no question left: a finding this large, or a ratio too small to become one.
_ENOUGH_DRAWS, _CERTAIN_RATIO, _NEGLIGIBLE_RATIO = 3, 1.6, 1.1

# Two standard deviations: below it a word is not worth a line, whatever chance does.
_SMALLEST_Z = 2.0

_NUM_DRAWS = 6
_NEW_TOKENS = 40
_MAX_SHOWN = 8
_TOKENS_SHOWN = 3


@dataclass(frozen=True)
class _Behaviour:
    """One model's side: divergence at each position of each text's answer, and its likeliest tokens there."""

    divergences: list[Tensor]
    likeliest: list[Tensor]

    @property
    def mean(self) -> float:
        return float(torch.cat(self.divergences).double().mean())


def diff_model(
    model_dir: Path | str,
    format: str,
    *,
    prompts_path: Path | None = None,
    num_draws: int = _NUM_DRAWS,
    seed: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> DiffReport:
    """Compare a model with what a stock quantizer makes of it.

    The quantized model is computed from the quantizer's own codes in float32, so that only its weights differ.

    Args:
        model_dir: Folder of a full-precision model with its tokenizer, or its name on the hub; code of its own is
            never run.
        format: The format.
        prompts_path: Prompts of the user's, besides the built-in ones.
        num_draws: Number of sign-randomised models, at least 3; fewer are made where they leave no question.
        seed: Seed of the signs; a fresh one by default.
        progress: Called with 1 for each of ``num_draws + 2`` models when it is done.

    Returns:
        The report.

    Raises:
        UsageError: The format is unknown, the path is not a folder, or the prompts cannot be read.
        CheckpointError: The folder is no model, or has no tokenizer.
    """
    from qcbguard_plugins.models.loading import load_full_precision, require_tokenizer

    start = time.monotonic()
    grid = get_grid(format)
    seed = secrets.randbits(63) if seed is None else seed
    prompts = gather_prompts(prompts_path)
    model_dir = local_model(model_dir)
    if not model_dir.is_dir():
        raise UsageError(
            f"{model_dir} is not a folder; answers need a full-precision model that can be run",
            remedy="Give the folder with config.json and the tokenizer; 'qcbguard scan' reads single files.",
        )
    tokenizer = require_tokenizer(
        model_dir, remedy="Put the tokenizer files beside the model; 'qcbguard scan' needs none."
    )
    model = load_full_precision(model_dir, torch.float32)
    layers = rounded_layers(model)
    if not layers:
        raise CheckpointError(f"{model_dir.name} has no layer that a stock quantizer rounds")
    comparison = _Comparison(model, tokenizer, layers, grid, seed, progress or (lambda _: None))
    return comparison.run(prompts, num_draws, start, display_name(model_dir), format)


def rounded_layers(model: Any) -> dict[str, tuple[Tensor, bool]]:
    """Weights that a stock quantizer rounds, each with true where it is kept as ``[in_features, out_features]``."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return {
        f"{name}.weight": (module.weight.data, isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not output
        and is_target(f"{name}.weight", tuple(module.weight.shape))
    }


class _Comparison:
    """A model whose weights are exchanged in place, and put back."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layers: dict[str, tuple[Tensor, bool]],
        grid: Grid,
        seed: int,
        progress: Callable[[int], object],
    ) -> None:
        self._model, self._tokenizer, self._layers = model, tokenizer, layers
        self._grid, self._seed, self._progress = grid, seed, progress
        self._kept = {name: weight.clone() for name, (weight, _) in layers.items()}
        self._errors: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(
        self, prompts: Sequence[tuple[str, str]], num_draws: int, start: float, name: str, format: str
    ) -> DiffReport:
        texts = [Prompt(kind, prompt, form) for kind, prompt in prompts for form in forms_of(prompt, self._tokenizer)]
        answers = generate_greedy(self._model, self._tokenizer, texts, _NEW_TOKENS)
        reference = log_probabilities(self._model, self._tokenizer, texts, answers)
        likeliest = [row.argmax(-1) for row in reference]
        self._progress(1)
        with self._exchanged(None):
            quantized = self._behaviour(texts, answers, reference)
            quantized_answers = generate_greedy(self._model, self._tokenizer, texts, _NEW_TOKENS)
        self._progress(1)
        draws, chance_z = [], 0.0
        for draw in range(num_draws):
            with self._exchanged(draw):
                draws.append(self._behaviour(texts, answers, reference))
                if draw == 0:
                    random_answers = generate_greedy(self._model, self._tokenizer, texts, _NEW_TOKENS)
                    chance_z = max((w.z for w in favoured_words(random_answers, answers, 1)), default=0.0)
            self._progress(1)
            if draw + 1 >= _ENOUGH_DRAWS and _is_certain(quantized, draws):
                self._progress(num_draws - draw - 1)
                break
        test = sign_randomization_test(quantized.mean, [draw.mean for draw in draws])
        moved = self._moved(texts, answers, quantized_answers, likeliest, quantized, draws)
        words = favoured_words(quantized_answers, answers)
        return self._report(test, quantized, draws, words, chance_z, moved, start, name, format)

    def _behaviour(self, texts: Sequence[Prompt], answers: Sequence[str], reference: Sequence[Tensor]) -> _Behaviour:
        own = log_probabilities(self._model, self._tokenizer, texts, answers)
        pairs = zip(reference, own, strict=True)
        return _Behaviour([divergence(theirs, ours) for theirs, ours in pairs], [row.argmax(-1) for row in own])

    @contextmanager
    def _exchanged(self, draw: int | None) -> Iterator[None]:
        """The model with rounded weights, or with the sign-randomised weights of a draw, until the block ends.

        The rounded weights come first: their errors are kept for the draws, in bfloat16, whose rounding is far below
        what matters to an error's size.
        """
        try:
            for name, (weight, transposed) in self._layers.items():
                kept = self._kept[name]
                matrix = kept.T.contiguous() if transposed else kept
                if draw is None:
                    new = rounded(matrix, self._grid)
                    self._errors[name] = (new - matrix).to(torch.bfloat16)
                else:
                    signed = sign_surrogate(self._errors[name], generator_for(self._seed, f"{draw}:{name}"))
                    new = matrix + signed
                weight.copy_(new.T if transposed else new)
            yield
        finally:
            for name, (weight, _) in self._layers.items():
                weight.copy_(self._kept[name])

    def _moved(
        self,
        texts: Sequence[Prompt],
        answers: Sequence[str],
        quantized_answers: Sequence[str],
        likeliest: Sequence[Tensor],
        quantized: _Behaviour,
        draws: Sequence[_Behaviour],
    ) -> list[MovedPrompt]:
        """The prompts whose divergence exceeds the expected one most, a prompt only once."""
        expected = [torch.stack([d.divergences[i] for d in draws]).mean(0) for i in range(len(texts))]
        excess = [float((q - e).mean()) for q, e in zip(quantized.divergences, expected, strict=True)]
        shown: dict[str, MovedPrompt] = {}
        for i in sorted(range(len(texts)), key=lambda i: -excess[i]):
            text = texts[i]
            if text.prompt not in shown and len(shown) < _MAX_SHOWN:
                shown[text.prompt] = MovedPrompt(
                    kind=text.kind,
                    prompt=text.prompt,
                    full_precision=answers[i].strip(),
                    quantized=quantized_answers[i].strip(),
                    divergence=float(quantized.divergences[i].mean()),
                    expected=float(expected[i].mean()),
                    tokens=self._tokens(text, answers[i], likeliest[i], quantized, expected[i], i),
                )
        return list(shown.values())

    def _tokens(
        self, text: Prompt, answer: str, likeliest: Tensor, quantized: _Behaviour, expected: Tensor, index: int
    ) -> tuple[MovedToken, ...]:
        ids = text.token_ids(self._tokenizer, answer)
        begin = len(text.token_ids(self._tokenizer)) - 1
        difference = quantized.divergences[index] - expected
        places = difference.topk(min(_TOKENS_SHOWN, difference.numel())).indices.tolist()
        return tuple(
            MovedToken(
                before=self._tokenizer.decode(
                    ids[max(0, begin + place - 11) : begin + place + 1], skip_special_tokens=True
                ),
                full_precision=self._tokenizer.decode([int(likeliest[place])]),
                quantized=self._tokenizer.decode([int(quantized.likeliest[index][place])]),
                divergence=float(quantized.divergences[index][place]),
                expected=float(expected[place]),
            )
            for place in places
        )

    def _report(
        self,
        test: Combined,
        quantized: _Behaviour,
        draws: Sequence[_Behaviour],
        words: Sequence[FavouredWord],
        chance_z: float,
        moved: Sequence[MovedPrompt],
        start: float,
        name: str,
        format: str,
    ) -> DiffReport:
        ratio = float(torch.tensor(test.effect, dtype=torch.float64).exp())
        return DiffReport(
            versions=versions(),
            model=name,
            format=format,
            seed=self._seed,
            divergence=quantized.mean,
            randomized=tuple(draw.mean for draw in draws),
            ratio=ratio,
            p_value=test.p_mean,
            differs=test.p_mean <= ALPHA and ratio >= SMALLEST_RATIO,
            words=tuple(
                Word(word=w.word, count=w.count, full_precision_count=w.reference_count, z=w.z)
                for w in words
                if w.z > max(chance_z, _SMALLEST_Z)
            ),
            chance_z=chance_z,
            prompts=tuple(moved),
            num_prompts=len(quantized.divergences),
            num_tokens=sum(d.numel() for d in quantized.divergences),
            num_targets=len(self._layers),
            elapsed_s=time.monotonic() - start,
        )


def _is_certain(quantized: _Behaviour, draws: Sequence[_Behaviour]) -> bool:
    """Whether more draws could change the verdict."""
    test = sign_randomization_test(quantized.mean, [draw.mean for draw in draws])
    ratio = float(torch.tensor(test.effect, dtype=torch.float64).exp())
    return ratio <= _NEGLIGIBLE_RATIO or (ratio >= _CERTAIN_RATIO and test.p_mean <= ALPHA)
