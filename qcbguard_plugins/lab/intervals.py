"""A measured number and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from qcbguard_plugins._util.records import Record
from qcbguard_plugins.errors import MissingDependencyError, UsageError

#: Confidence of every interval of the lab.
CONFIDENCE = 0.95
_RESAMPLES = 2_000


class Estimate(Record):
    """A number with its confidence interval.

    Attributes:
        value: The point estimate.
        low: Lower end of the 95 % interval; ``None`` where one observation gives none.
        high: Upper end.
        num_observations: What the interval is over: prompts, pairs, or seeds.
    """

    value: float
    low: float | None = None
    high: float | None = None
    num_observations: int = Field(ge=1)


def share(num_hits: int, num_trials: int) -> Estimate:
    """A share with Wilson's interval, which is sound at 0 and at 1.

    Args:
        num_hits: Number of successes.
        num_trials: Number of trials, at least 1.

    Raises:
        UsageError: There are no trials, or more hits than trials.
    """
    if not 0 <= num_hits <= num_trials or num_trials < 1:
        raise UsageError(f"{num_hits} of {num_trials} is no share")
    interval = _stats().binomtest(num_hits, num_trials).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(
        value=num_hits / num_trials, low=float(interval.low), high=float(interval.high), num_observations=num_trials
    )


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Estimate:
    """The difference of two shares over the same prompts, sound where no prompt differs.

    Args:
        ours: Successes, one a prompt.
        theirs: Successes on the same prompts, in the same order.

    Raises:
        UsageError: The lists differ in length or are empty.

    References:
        Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired
        Data", 2012.
    """
    if len(ours) != len(theirs) or not ours:
        raise UsageError(f"{len(ours)} and {len(theirs)} answers are no pairs")
    more = sum(one and not other for one, other in zip(ours, theirs, strict=True))
    fewer = sum(other and not one for one, other in zip(ours, theirs, strict=True))
    trials = len(ours) + 2
    above, below = (more + 1) / trials, (fewer + 1) / trials
    error = math.sqrt((above + below - (above - below) ** 2) / trials)
    half = float(_stats().norm.ppf((1 + CONFIDENCE) / 2)) * error
    middle = above - below
    return Estimate(
        value=(more - fewer) / len(ours),
        low=max(-1.0, middle - half),
        high=min(1.0, middle + half),
        num_observations=len(ours),
    )


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """``sum(numerators) / sum(denominators)`` with a bootstrap interval over the pairs of them.

    A mean over tokens whose observations are texts: the tokens of one text belong together, so texts are drawn.

    Args:
        numerators: One number a text, such as the sum of a loss over its tokens.
        denominators: One number a text, such as the number of its tokens; their sum is positive.

    Raises:
        UsageError: The lists differ in length, are empty, or hold a number that is not finite.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise UsageError(f"{len(numerators)} numerators and {len(denominators)} denominators give no ratio")
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if not (np.isfinite(above).all() and np.isfinite(below).all()) or below.sum() <= 0:
        raise UsageError("a ratio of sums needs finite numbers and a positive sum below the line")
    value = float(above.sum() / below.sum())
    if len(above) == 1:
        return Estimate(value=value, num_observations=1)
    found = _stats().bootstrap(
        (above, below),
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = found.confidence_interval
    return Estimate(value=value, low=float(interval.low), high=float(interval.high), num_observations=len(above))


def exponential(estimate: Estimate) -> Estimate:
    """The exponential of an estimate and of its ends: perplexity from a mean loss."""
    ends = [None if end is None else math.exp(end) for end in (estimate.low, estimate.high)]
    return Estimate(
        value=math.exp(estimate.value), low=ends[0], high=ends[1], num_observations=estimate.num_observations
    )


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number a seed, with Student's interval; no interval for a single seed.

    Raises:
        UsageError: There are no values.
    """
    if not values:
        raise UsageError("no seed gave a value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(value=mean, num_observations=1)
    stats = _stats()
    error = float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(value=mean, low=mean - half, high=mean + half, num_observations=len(values))


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingDependencyError("intervals need scipy", remedy="pip install 'qcbguard-plugins[lab]'") from error
    return stats
