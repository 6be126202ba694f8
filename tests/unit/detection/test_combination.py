from __future__ import annotations

import pytest
import torch

from qcbguard_plugins.detection.weights.combination import combine, holm


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_p_values_are_uniform_under_the_null() -> None:
    generator = torch.Generator().manual_seed(0)
    p_means = []
    for _ in range(400):
        common = torch.randn(1, 9, generator=generator) * 0.02
        table = (torch.randn(10, 9, generator=generator) * 0.01 + common).exp()
        p_means.append(combine(table).p_mean)
    found = torch.tensor(p_means)
    for level in (0.05, 0.2, 0.5, 0.8):
        assert float((found < level).double().mean()) == pytest.approx(level, abs=0.06)


def test_a_shift_of_all_and_a_shift_of_one_are_both_found() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20, 9, generator=generator) * 0.01
    everywhere, somewhere = noise.clone(), noise.clone()
    everywhere[:, 0] += 0.05
    somewhere[7, 0] += 0.3
    assert combine(everywhere.exp()).p_mean < 1e-6
    found = combine(somewhere.exp())
    assert found.adjusted[7] < 1e-8 and found.p_value < 1e-7
    assert min(p for i, p in enumerate(found.adjusted) if i != 7) > 0.001


def test_nothing_is_nothing() -> None:
    found = combine(torch.empty(0, 9))
    assert found.p_value == 1.0 and found.effects == ()
