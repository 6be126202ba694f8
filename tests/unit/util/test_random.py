from __future__ import annotations

import pytest
import torch

from qcbguard_plugins._util import random as draws
from qcbguard_plugins._util.philox_constants import GROUP, LANES
from qcbguard_plugins._util.random import philox, philox_key, uniform

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        # The authors' test vectors (Random123, kat_vectors), the counters whose upper half is zero.
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_the_generator_is_the_papers(key: int, counter: int, words: tuple[int, ...]) -> None:
    group = philox(key, counter // LANES, 1, CPU).view(4, LANES)
    assert (group[:, counter % LANES] * 2**24).long().tolist() == [word >> 8 for word in words]


@pytest.mark.parametrize("first", [0, 1, 63, 64, 1000, 2**31 - 5, 2**32 - 7, 2**36 - 1, 2**37 + 12345])
@pytest.mark.parametrize("num_draws", [1, 64, 300])
def test_the_compiled_generator_has_the_same_bits(first: int, num_draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    key = philox_key(7, f"w{first}")
    compiled = uniform(key, first, num_draws, CPU)
    monkeypatch.setattr(draws, "_compiled", lambda: None)
    assert torch.equal(compiled, uniform(key, first, num_draws, CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_another_device_draws_the_same() -> None:
    key = philox_key(7, "w")
    assert torch.equal(uniform(key, 100, 5000, CPU), uniform(key, 100, 5000, torch.device("cuda")).cpu())


def test_a_draw_belongs_to_its_place() -> None:
    key = philox_key(0, "w")
    whole = uniform(key, 0, 10 * GROUP, CPU)
    for first, stop in ((0, 5), (5, 64), (63, 65), (64, 640), (100, 101)):
        assert torch.equal(whole[first:stop], uniform(key, first, stop - first, CPU))


def test_without_numba_runs_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    key = philox_key(0, "w")
    monkeypatch.setattr(draws, "_compiled", lambda: None)
    monkeypatch.setattr(draws, "_GROUPS_PER_RUN", 3)
    assert torch.equal(uniform(key, 70, 1000, CPU), philox(key, 0, 20, CPU)[70:1070])
    assert uniform(key, 64, 0, CPU).shape == (0,)


def test_draws_are_uniform_and_those_of_two_names_independent() -> None:
    first, second = (uniform(philox_key(0, name), 0, 1 << 20, CPU).double() for name in ("a", "b"))
    counts = torch.histc(first, 256, 0, 1)
    chi_square = float(((counts - 4096) ** 2 / 4096).sum())
    assert 255 - 5 * 510**0.5 < chi_square < 255 + 5 * 510**0.5
    assert float(first.min()) >= 0 and float(first.max()) < 1
    for one, other in ((first, second), (first[1:], first[:-1]), (first[16:], first[:-16]), (first[64:], first[:-64])):
        correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
        assert abs(correlation) < 5 / len(one) ** 0.5
