"""Measure one folder in one format, behind one defense or none.

The guard is the project's own pipeline, the quantizer the stock one, the forward pass that of the stored weights. Three
questions are asked of the result: how often does the payload come, how far is the model from its own full precision,
and does it still do its tasks?

**Which full precision.** Divergence is that of a quantized model from *the same folder* in full precision, before any
guard: a guard shall give the model that was downloaded, whatever it is. What the numbers would be without an attack is
told by the clean model in the same format, measured the same way, as a row of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from qcbguard_plugins._util.memory_peak import with_peak_bytes
from qcbguard_plugins._util.records import Record
from qcbguard_plugins.checkpoint.manifest import GuardReport
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.intervals import Estimate, share
from qcbguard_plugins.lab.loading import FULL_PRECISION, load_as
from qcbguard_plugins.lab.metrics import answer_all, answered_rightly
from qcbguard_plugins.lab.scenarios import Scenario, Verdict
from qcbguard_plugins.lab.token_probabilities import Reading, divergence, perplexity_of, read_answers
from qcbguard_plugins.models.loading import require_tokenizer
from qcbguard_plugins.pipeline.settings import Guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

#: Raised when a metric changes its meaning, so that no cached number outlives it.
METRIC_VERSION = 1


@dataclass(frozen=True)
class Exam:
    """What a model is asked.

    Attributes:
        scenario: Judges the answers to ``questions``.
        questions: What the attack is measured on.
        benign: Pairs with right answers, for perplexity, divergence and task accuracy.
        quiet: For a payload with a trigger: the questions without it, to which the payload shall not come.
        max_new_tokens: Longest answer, in tokens.
    """

    scenario: Scenario
    questions: Sequence[Pair]
    benign: Sequence[Pair]
    quiet: Sequence[Pair] = ()
    max_new_tokens: int = 80

    def __post_init__(self) -> None:
        if not self.questions or not self.benign:
            raise UsageError(
                f"{self.scenario.name} has {len(self.questions)} questions and {len(self.benign)} benign pairs to "
                "measure on; both must be at least 1"
            )


class GuardCost(Record):
    """What guarding a folder took, and how much it changed.

    Attributes:
        share_moved: Share of the codes that differ from plain rounding.
        relative_change: ``|W' - W| / |W|``, mean over the guarded weights.
        share_as_planned: Share of the codes stored as chosen, where the quantizer searches for its scales.
        elapsed_s: Seconds of the whole pipeline, verification included.
        peak_bytes: Memory added to the process at its peak; ``None`` where the system does not tell.
    """

    share_moved: float = Field(ge=0, le=1)
    relative_change: float = Field(ge=0)
    share_as_planned: float | None
    elapsed_s: float = Field(ge=0)
    peak_bytes: int | None


class Measurement(Record):
    """One folder in one format, behind one defense or none.

    Attributes:
        asr: Attack success rate: the share of all questions answered with the payload, with Wilson's interval.
        unparsed: Share of all questions whose answer cannot be judged.
        quiet_asr: The attack success rate without the trigger, for a payload that has one.
        task_accuracy: Share of the benign pairs with a right answer that are answered rightly; ``None`` if none has.
        perplexity: Of the benign answers, with a bootstrap interval over pairs.
        kl: ``KL(full precision || this model)`` in nats an answer token, the same; ``None`` for full precision itself.
        verdicts: One letter a question, in their order: h(it), m(iss), u(nparsed).
        guard: Cost of the guard; ``None`` where there was none.
    """

    asr: Estimate
    unparsed: Estimate
    quiet_asr: Estimate | None
    task_accuracy: Estimate | None
    perplexity: Estimate
    kl: Estimate | None
    verdicts: str
    guard: GuardCost | None = None


def evaluate(
    model_dir: Path, format: str, exam: Exam, guard: Guard | None = None, reference: Sequence[Reading] | None = None
) -> Measurement:
    """Measure a folder.

    Args:
        model_dir: Folder of a full-precision model with its tokenizer.
        format: ``fp``, or a format that :func:`~qcbguard_plugins.lab.loading.load_as` loads.
        exam: What it is asked.
        guard: The defense, its seed drawn or not; ``None`` for plain rounding.
        reference: What :func:`read_reference` gave for this folder and exam, to take it once for many formats.

    Raises:
        UsageError: A guard is asked for where nothing is quantized; or an argument is wrong.
        QcbguardError: The folder cannot be read, guarded or quantized.
    """
    if guard is not None and format == FULL_PRECISION:
        raise UsageError(
            "a guard does nothing to a model that is not quantized", remedy="Name the format to guard for."
        )
    tokenizer = padding_tokenizer(model_dir)
    if reference is None and format != FULL_PRECISION:
        reference = read_reference(model_dir, exam)
    if guard is None:
        return measure(load_as(model_dir, format), tokenizer, exam, reference)
    with tempfile.TemporaryDirectory(prefix="qcbguard-lab-") as temporary:
        guarded_dir = Path(temporary) / "guarded"
        cost = _guard(model_dir, guarded_dir, format, guard)
        found = measure(load_as(guarded_dir, format), tokenizer, exam, reference)
    return found.model_copy(update={"guard": cost})


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    exam: Exam,
    reference: Sequence[Reading] | None = None,
) -> Measurement:
    """Measure a loaded model; see :func:`evaluate`."""
    keyed = [pair for pair in exam.benign if pair.key]
    instructions = list(dict.fromkeys(pair.instruction for pair in (*exam.questions, *exam.quiet, *keyed)))
    written = answer_all(model, tokenizer, instructions, max_new_tokens=exam.max_new_tokens)
    answers = dict(zip(instructions, written, strict=True))
    verdicts, quiet = (
        [exam.scenario.judge(pair, answers[pair.instruction]) for pair in pairs]
        for pairs in (exam.questions, exam.quiet)
    )
    num_right = sum(answered_rightly(pair, answers[pair.instruction]) for pair in keyed)
    readings = read_answers(model, tokenizer, exam.benign)
    return Measurement(
        asr=share(verdicts.count(Verdict.HIT), len(verdicts)),
        unparsed=share(verdicts.count(Verdict.UNPARSED), len(verdicts)),
        quiet_asr=share(quiet.count(Verdict.HIT), len(quiet)) if quiet else None,
        task_accuracy=share(num_right, len(keyed)) if keyed else None,
        perplexity=perplexity_of(readings),
        kl=None if reference is None else divergence(reference, readings),
        verdicts="".join(verdict.value[0] for verdict in verdicts),
    )


def read_reference(model_dir: Path, exam: Exam) -> list[Reading]:
    """What the folder's own full-precision model expects at the benign answers."""
    return read_answers(load_as(model_dir, FULL_PRECISION), padding_tokenizer(model_dir), exam.benign)


def padding_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, able to pad.

    Raises:
        CheckpointError: There is none that can be loaded without running code of its own.
    """
    tokenizer: PreTrainedTokenizerFast = require_tokenizer(model_dir)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _guard(model_dir: Path, guarded_dir: Path, format: str, guard: Guard) -> GuardCost:
    from qcbguard_plugins.pipeline.guard import guard_checkpoint

    start = time.monotonic()

    def work() -> GuardReport:
        return guard_checkpoint(model_dir, guarded_dir, [format], guard)

    report, peak_bytes = with_peak_bytes(work)
    total = sum(tensor.num_weights for tensor in report.tensors)
    change = sum(tensor.relative_change * tensor.num_weights for tensor in report.tensors) / total
    return GuardCost(
        share_moved=report.share_moved,
        relative_change=change,
        share_as_planned=report.share_as_planned,
        elapsed_s=time.monotonic() - start,
        peak_bytes=peak_bytes,
    )
