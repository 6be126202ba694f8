from __future__ import annotations

import pytest

pytest.importorskip("scipy")

from benchmarks._common import DATA_DIR
from benchmarks.studies.detection.document import area, flagged, roc, upper_bound
from benchmarks.studies.detection.measure import read
from qcbguard_plugins.detection.weights.power import STUDIES, power_at


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


def test_the_power_that_a_scan_prints_is_that_of_the_studies() -> None:
    small = [row for row in read(DATA_DIR / "detection.jsonl") if row.get("target")]
    small = [row for row in small if row["kind"] != "honest fine-tune of a dequantized model"]
    real = [row for row in read(DATA_DIR / "real_models.jsonl") if row["kind"] == "attacked"]
    found = [sum(map(flagged, small)), sum(any(part["attacked"] for part in row["scan"].values()) for row in real)]
    assert [(study.found, study.attacked) for study in STUDIES] == list(
        zip(found, [len(small), len(real)], strict=True)
    )
    assert power_at(1_800_000) is STUDIES[0] and power_at(8_000_000_000) is STUDIES[1]
