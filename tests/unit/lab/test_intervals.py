"""Intervals, divergence and DER against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from qcbguard_plugins._util.memory_peak import with_peak_bytes
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.der import defense_effectiveness_ratio
from qcbguard_plugins.lab.intervals import exponential, mean_over_seeds, paired_difference, ratio_of_sums, share
from qcbguard_plugins.lab.token_probabilities import Reading, divergence, perplexity_of


def test_wilson_interval_of_eight_in_ten() -> None:
    # Centre (0.8 + 0.19207) / 1.38415, half-width 1.95996 * sqrt(0.016 + 0.0096036) / 1.38415.
    found = share(8, 10)
    assert found.value == 0.8
    assert (found.low, found.high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))


@pytest.mark.parametrize("hits", [0, 50])
def test_an_interval_at_the_edge_has_a_width(hits: int) -> None:
    found = share(hits, 50)
    assert found.low is not None and found.high is not None
    # z^2 / (n + z^2) with z = 1.95996.
    assert found.high - found.low == pytest.approx(3.84146 / 53.84146, abs=1e-5)


@pytest.mark.parametrize(("hits", "trials"), [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_no_share(hits: int, trials: int) -> None:
    with pytest.raises(UsageError, match="is no share"):
        share(hits, trials)


def test_a_difference_over_the_same_prompts() -> None:
    # Of ten prompts two more and one fewer; one added to each makes 3 and 2 of 12.
    found = paired_difference([True] * 5 + [False] * 5, [True] * 3 + [False] * 6 + [True])
    assert found.value == pytest.approx(0.1)
    half = 1.95996 * math.sqrt((5 / 12 - 1 / 144) / 12)
    assert (found.low, found.high) == (pytest.approx(1 / 12 - half, abs=1e-5), pytest.approx(1 / 12 + half, abs=1e-5))


def test_a_difference_where_no_prompt_differs_has_a_width() -> None:
    found = paired_difference([False] * 100, [False] * 100)
    assert found.value == 0
    assert found.high is not None and found.low == pytest.approx(-found.high)
    # Wilson's interval of a share of 0 in 100 reaches to 3.7 %, that of a difference not as far.
    assert 0.02 < found.high < 0.037


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([True], [True, False])])
def test_no_pairs(ours: list[bool], theirs: list[bool]) -> None:
    with pytest.raises(UsageError, match="no pairs"):
        paired_difference(ours, theirs)


def test_students_interval_over_three_seeds() -> None:
    # Standard error 0.1 / sqrt(3), times t(0.975; 2) = 4.30265.
    found = mean_over_seeds([0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.2 - 0.24841, abs=1e-5), pytest.approx(0.2 + 0.24841, abs=1e-5))
    assert mean_over_seeds([0.4]).low is None


def test_a_ratio_weighs_tokens_and_its_interval_holds_it() -> None:
    found = ratio_of_sums([1.0, 9.0], [1, 3])
    assert found.value == 2.5
    assert (found.low, found.high) == (1.0, 3.0), "two texts: the bootstrap draws one of them twice, or both"
    assert ratio_of_sums([1.0], [2]).low is None
    with pytest.raises(UsageError, match="finite"):
        ratio_of_sums([math.nan, 1], [1, 1])
    with pytest.raises(UsageError, match="no ratio"):
        ratio_of_sums([], [])


def _reading(rows: list[list[float]], ids: list[int]) -> Reading:
    return Reading(torch.tensor(rows).log(), torch.tensor(ids))


def test_divergence_per_answer_token() -> None:
    # Token 1: (ln(0.5/0.75) + ln(0.5/0.25)) / 2 = 0.14384; tokens 2 and 3: none.
    full = [_reading([[0.5, 0.5]], [0]), _reading([[0.2, 0.8], [0.9, 0.1]], [1, 0])]
    rounded = [_reading([[0.75, 0.25]], [0]), _reading([[0.2, 0.8], [0.9, 0.1]], [1, 0])]
    assert divergence(full, rounded).value == pytest.approx(0.143841 / 3, abs=1e-6)
    assert divergence(full, full).value == 0


def test_divergence_of_different_answers_is_refused() -> None:
    with pytest.raises(UsageError, match="same answers"):
        divergence([_reading([[0.5, 0.5]], [0])], [_reading([[0.5, 0.5]], [1])])


def test_perplexity_of_a_fair_coin_and_a_certain_token() -> None:
    # Losses ln 2 and 0 over two tokens: exp(ln 2 / 2).
    readings = [_reading([[0.5, 0.5]], [1]), _reading([[1.0, 1e-30]], [0])]
    assert perplexity_of(readings).value == pytest.approx(math.sqrt(2), rel=1e-5)


def test_the_exponential_keeps_the_order_of_the_ends() -> None:
    found = exponential(ratio_of_sums([0.0, 2.0], [1, 1]))
    assert (found.low, found.value, found.high) == (1.0, pytest.approx(math.e), pytest.approx(math.e**2))


def test_der_of_the_published_example() -> None:
    # FlipGuard, StarCoder-1B, INT8, 10 % of the codes: 1.07. Full security, utility 9.2 % above the clean model's.
    assert defense_effectiveness_ratio(1.0, 0.9, 1.092, 1.0, 0.10) == pytest.approx(1.07, abs=0.005)


@pytest.mark.parametrize(
    ("security", "base", "utility", "moved", "expected"),
    [
        (1.0, 1.0, 0.8, 0.0, 1.0),
        (0.5, 1.0, 0.8, 0.0, 0.5),
        (1.0, 1.0, 0.4, 0.0, 0.5),
        (1.0, 1.0, 0.8, 1.0, math.exp(-0.2)),
        (0.9, 0.6, 0.8, 0.0, 1.0),
    ],
)
def test_der(security: float, base: float, utility: float, moved: float, expected: float) -> None:
    assert defense_effectiveness_ratio(security, base, utility, 0.8, moved) == pytest.approx(expected)


def test_der_of_nonsense_is_refused() -> None:
    for arguments in ((1.1, 1.0, 1.0, 1.0, 0.0), (1.0, 0.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0, 0.0)):
        with pytest.raises(UsageError, match="no ratio"):
            defense_effectiveness_ratio(*arguments)


def test_peak_memory_is_that_of_the_work_and_not_of_the_process() -> None:
    _, large = with_peak_bytes(lambda: len(b"a" * 200_000_000))
    _, again = with_peak_bytes(lambda: len(b"a" * 200_000_000))
    _, small = with_peak_bytes(lambda: None)
    if large is None or again is None or small is None:
        pytest.skip("the kernel does not tell a process its peak memory")
    assert min(large, again) > 150_000_000
    assert small < 50_000_000
