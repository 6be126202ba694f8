from __future__ import annotations

import pytest

pytest.importorskip("scipy")

from benchmarks.studies.detection.document import area, roc, upper_bound


def test_area_by_hand() -> None:
    assert area([0.5, 0.9], [0.1, 0.2]) == 1.0
    assert area([0.5], [0.5]) == 0.5
    assert area([0.1, 0.9], [0.5]) == 0.5


def test_a_curve_runs_from_nothing_to_everything() -> None:
    points = roc([0.5, 0.9], [0.1, 0.7])
    assert points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
    assert (0.0, 0.5) in points and (0.5, 1.0) in points


def test_upper_bound_of_none() -> None:
    assert upper_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-6)
    assert upper_bound(5, 5) == 1.0
