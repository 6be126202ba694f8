"""Which words does one model favour over another?

References:
    Monroe, Colaresi and Quinn, Fightin' Words, Political Analysis 16 (2008), section 3.5 (log-odds ratio with an
    informative Dirichlet prior).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_][\w'-]*")

# Weight of the prior, in words. It has the shape of both texts together, so that a word used by both alike scores 0.
_PRIOR_WORDS = 200.0


@dataclass(frozen=True)
class FavouredWord:
    """A word, how often it occurs in either text, and how sure it is that one favours it.

    Attributes:
        word: As it is written most often.
        count: Number of times in the text that is tested.
        reference_count: Number of times in the other.
        z: Log-odds ratio over its standard deviation.
    """

    word: str
    count: int
    reference_count: int
    z: float


def favoured_words(texts: Iterable[str], reference: Iterable[str], limit: int = 12) -> list[FavouredWord]:
    """The words that ``texts`` favour over ``reference``, most certain first.

    A text counts a word once, however often it repeats it, so that a loop of one answer favours nothing.
    """
    ours, theirs = _document_counts(texts), _document_counts(reference)
    both = ours + theirs
    total = sum(both.values())
    if not total:
        return []
    num_ours, num_theirs = sum(ours.values()), sum(theirs.values())
    scored = []
    for word, count in ours.items():
        prior = _PRIOR_WORDS * both[word] / total
        delta = _log_odds(count + prior, num_ours + _PRIOR_WORDS) - _log_odds(
            theirs[word] + prior, num_theirs + _PRIOR_WORDS
        )
        z = delta / math.sqrt(1 / (count + prior) + 1 / (theirs[word] + prior))
        scored.append(FavouredWord(word, count, theirs[word], z))
    return sorted(scored, key=lambda found: -found.z)[:limit]


def _log_odds(count: float, total: float) -> float:
    return math.log(count) - math.log(max(total - count, 1e-9))


def _document_counts(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(_WORD.findall(text)))
    return counts
