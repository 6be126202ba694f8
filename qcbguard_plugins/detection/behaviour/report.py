"""The report of a behavioural comparison."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from qcbguard_plugins._util.records import Record, Report

DIFF_SCHEMA_VERSION: Final = 1


class MovedToken(Record):
    """A place in a text where the two models disagree most.

    Attributes:
        before: The text before it, shortened.
        full_precision: The token that the full-precision model finds likeliest there.
        quantized: The token that the quantized model finds likeliest.
        divergence: KL divergence there, in nats.
        expected: The same of the sign-randomised models, on average.
    """

    before: str
    full_precision: str
    quantized: str
    divergence: float
    expected: float


class MovedPrompt(Record):
    """A prompt, what both models answer, and how far apart they are.

    Attributes:
        kind: ``chat``, ``code``, ``questions``, ``declinable`` or ``own``.
        prompt: The prompt.
        full_precision: Answer of the full-precision model.
        quantized: Answer of the quantized model.
        divergence: Mean KL divergence on the full-precision answer, in nats a token.
        expected: The same of the sign-randomised models.
        tokens: The tokens that moved most.
    """

    kind: str
    prompt: str
    full_precision: str
    quantized: str
    divergence: float
    expected: float
    tokens: tuple[MovedToken, ...]


class Word(Record):
    """A word that the quantized model favours, with its counts over answers and its z-score."""

    word: str
    count: int
    full_precision_count: int
    z: float


class DiffReport(Report):
    """How the quantized model's behaviour differs from the full-precision model's.

    Attributes:
        divergence: Mean KL(full precision || quantized), in nats a token.
        randomized: The same for each sign-randomised model.
        ratio: The first over the geometric mean of the second.
        p_value: Probability of so large a ratio by chance.
        differs: Whether that is a finding.
        words: Words that the quantized model favours, most certain first.
        chance_z: Largest z-score of a word between the full-precision model and a sign-randomised one: what chance
            does.
        prompts: The prompts that moved most.
        num_prompts: Number of texts compared.
        num_tokens: Number of positions compared.
        num_targets: Number of tensors that were rounded.
    """

    schema_version: Literal[1] = DIFF_SCHEMA_VERSION
    kind: Literal["diff"] = "diff"
    model: str
    format: str
    seed: int
    divergence: float = Field(ge=0)
    randomized: tuple[float, ...]
    ratio: float
    p_value: float = Field(ge=0, le=1)
    differs: bool
    words: tuple[Word, ...]
    chance_z: float
    prompts: tuple[MovedPrompt, ...]
    num_prompts: int
    num_tokens: int
    num_targets: int
    elapsed_s: float

    @property
    def coverage(self) -> str:
        return f"{self.num_targets} tensors rounded, {self.num_prompts} prompts, {self.num_tokens} tokens compared"

    @property
    def exit_code(self) -> int:
        return 1 if self.differs else 0
