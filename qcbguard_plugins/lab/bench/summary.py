"""Cells of several seeds as one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from qcbguard_plugins._util.records import Record
from qcbguard_plugins.lab.bench.results import FULL, STOCK, Cell, Variant
from qcbguard_plugins.lab.der import defense_effectiveness_ratio
from qcbguard_plugins.lab.evaluation import Measurement
from qcbguard_plugins.lab.intervals import Estimate, mean_over_seeds, paired_difference, share
from qcbguard_plugins.lab.loading import FULL_PRECISION


class Line(Record):
    """One line of the table: a model, a format and a defense, over all seeds.

    Attributes:
        row: Name of the attack or folder.
        variant: The attacked model, or the clean one.
        format: ``fp`` or the format.
        defense: Name of the defense.
        num_seeds: Seeds that were measured.
        asr: Attack success rate over the questions of all seeds, with Wilson's interval over prompts.
        asr_over_seeds: The mean over seeds, with Student's interval over seeds.
        asr_from_full: Distance from the same folder's rate in full precision, over the questions of all seeds, with an
            interval over prompts.
        quiet_asr: Attack success rate without the trigger, for a payload that has one.
        unparsed: Share of the answers that cannot be judged.
        kl: Divergence from the same folder in full precision, nats an answer token.
        perplexity: Of the benign answers.
        task_accuracy: Share of the benign tasks done rightly.
        share_moved: Share of the codes moved.
        relative_change: ``|W' - W| / |W|``.
        guard_s: Seconds of guarding.
        guard_peak_bytes: Memory that guarding added at its peak, the largest over seeds.
        der: Defense effectiveness ratio over the clean model in full precision; ``None`` where no task has a right
            answer.
    """

    row: str
    variant: Variant
    format: str
    defense: str
    num_seeds: int
    asr: Estimate
    asr_over_seeds: Estimate
    asr_from_full: Estimate | None
    quiet_asr: Estimate | None
    unparsed: Estimate
    kl: Estimate | None
    perplexity: Estimate
    task_accuracy: Estimate | None
    share_moved: float | None
    relative_change: float | None
    guard_s: float | None
    guard_peak_bytes: int | None
    der: float | None


def summarize(cells: Iterable[Cell]) -> list[Line]:
    """Lines in the order of the cells; cells that failed are left out of their line."""
    groups: dict[tuple[str, Variant, str, str], list[Cell]] = {}
    measured = [cell for cell in cells if cell.measurement is not None]
    for cell in measured:
        place = cell.place
        groups.setdefault((place.row, place.variant, place.format, place.defense), []).append(cell)
    by_seed = {(c.place.row, c.place.variant, c.place.seed): c for c in measured if c.place.format == FULL_PRECISION}
    return [_line(group, by_seed) for group in groups.values()]


def find(lines: Iterable[Line], row: str, variant: Variant, format: str, defense: str) -> Line | None:
    """One line."""
    wanted = (row, variant, format, defense)
    return next((line for line in lines if (line.row, line.variant, line.format, line.defense) == wanted), None)


def full_precision(lines: Iterable[Line], row: str, variant: Variant = "attacked") -> Line | None:
    """The line of a row in full precision."""
    return find(lines, row, variant, FULL_PRECISION, FULL)


def stock(lines: Iterable[Line], row: str, format: str, variant: Variant = "attacked") -> Line | None:
    """The line of a row after plain rounding."""
    return find(lines, row, variant, format, STOCK)


def _line(cells: Sequence[Cell], by_seed: dict[tuple[str, Variant, int], Cell]) -> Line:
    place = cells[0].place
    found = [_measured(cell) for cell in cells]
    own_full = [by_seed.get((place.row, place.variant, cell.place.seed)) for cell in cells]
    pairs = [(m, _measured(full)) for m, full in zip(found, own_full, strict=True) if full is not None]
    ratios = [_ratio(m, by_seed.get((place.row, "clean", c.place.seed))) for m, c in zip(found, cells, strict=True)]
    known = [ratio for ratio in ratios if ratio is not None]
    guards = [m.guard for m in found if m.guard is not None]
    peaks = [guard.peak_bytes for guard in guards if guard.peak_bytes is not None]
    return Line(
        row=place.row,
        variant=place.variant,
        format=place.format,
        defense=place.defense,
        num_seeds=len(cells),
        asr=_pooled([m.asr for m in found]),
        asr_over_seeds=mean_over_seeds([m.asr.value for m in found]),
        asr_from_full=_distance(pairs) if pairs else None,
        quiet_asr=_pooled_if(found, lambda m: m.quiet_asr),
        unparsed=_pooled([m.unparsed for m in found]),
        kl=_averaged([m.kl for m in found if m.kl is not None]),
        perplexity=_averaged([m.perplexity for m in found]) or found[0].perplexity,
        task_accuracy=_pooled_if(found, lambda m: m.task_accuracy),
        share_moved=_mean([guard.share_moved for guard in guards]) if guards else None,
        relative_change=_mean([guard.relative_change for guard in guards]) if guards else None,
        guard_s=_mean([guard.elapsed_s for guard in guards]) if guards else None,
        guard_peak_bytes=max(peaks) if peaks else None,
        der=_mean(known) if known else None,
    )


def _measured(cell: Cell) -> Measurement:
    assert cell.measurement is not None, "only measured cells are summarized"
    return cell.measurement


def _ratio(measurement: Measurement, clean: Cell | None) -> float | None:
    """DER over the clean model in full precision; accuracy is the one utility score."""
    base = None if clean is None else _measured(clean)
    if base is None or base.task_accuracy is None or measurement.task_accuracy is None:
        return None
    if base.asr.value == 1 or base.task_accuracy.value == 0:
        return None
    moved = 0.0 if measurement.guard is None else measurement.guard.share_moved
    return defense_effectiveness_ratio(
        1 - measurement.asr.value, 1 - base.asr.value, measurement.task_accuracy.value, base.task_accuracy.value, moved
    )


def _distance(pairs: Sequence[tuple[Measurement, Measurement]]) -> Estimate:
    """How much oftener the first of each pair shows the payload than the second, asked the same."""
    hits = [[letter == "h" for m in side for letter in m.verdicts] for side in zip(*pairs, strict=True)]
    return paired_difference(*hits)


def _pooled(shares: Sequence[Estimate]) -> Estimate:
    """One share over the trials of several."""
    trials = sum(estimate.num_observations for estimate in shares)
    return share(sum(round(estimate.value * estimate.num_observations) for estimate in shares), trials)


def _pooled_if(found: Sequence[Measurement], pick: Callable[[Measurement], Estimate | None]) -> Estimate | None:
    shares = [estimate for estimate in map(pick, found) if estimate is not None]
    return _pooled(shares) if shares else None


def _averaged(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean of several estimates; the ends are the means of the ends, which is cautious: seeds differ by less."""
    if not estimates:
        return None
    lows = [e.low for e in estimates if e.low is not None]
    highs = [e.high for e in estimates if e.high is not None]
    return Estimate(
        value=_mean([e.value for e in estimates]),
        low=_mean(lows) if lows else None,
        high=_mean(highs) if highs else None,
        num_observations=sum(e.num_observations for e in estimates),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
