"""The page about speed says what was measured, what was not, and what was missed."""

from __future__ import annotations

from benchmarks.pages.performance_page import page

TENSORS = {
    "machine": "2 cores",
    "commit": "abc1234",
    "rows": [
        {"format": "nf4", "dtype": "float32", "guard_s": 0.1, "stock_s": 0.4},
        {"format": "fp4", "dtype": "float32", "guard_s": 0.3, "stock_s": 0.4},
        {"format": "int8", "dtype": "float32", "guard_s": 0.3, "stock_s": 0.1},
    ],
}


def test_a_ratio_stands_beside_its_goal() -> None:
    text = page({"tensors": TENSORS})
    assert "Machine: 2 cores; commit abc1234." in text
    assert "| nf4, float32 | 0.10 s / 0.40 s | 0.25 | at most 0.5 | met |" in text
    assert "| fp4, float32 | 0.30 s / 0.40 s | 0.75 | at most 0.5 | missed |" in text
    assert "| int8, float32 | 0.30 s / 0.10 s | 3.00 |  |  |" in text


def test_what_was_not_measured_says_why() -> None:
    text = page({"gpu": {"skipped": "no CUDA device"}})
    assert "Not measured: no CUDA device." in text
    assert "Not measured: not run." in text


def test_more_processes_shall_be_faster() -> None:
    seconds = {
        "plain copy": 2.0, "start of one process": 1.0, "start of two processes": 1.5, "one process, one thread": 10.0,
        "one process, two threads": 5.0, "two processes, one thread each": 6.0,
    }  # fmt: skip
    jobs = {job: {"elapsed_s": elapsed_s, "peak_bytes": 6e8} for job, elapsed_s in seconds.items()}
    result = {"machine": "", "commit": "", "gigabytes": 2.0, "jobs": jobs, "largest_tensor_bytes": 1e8}
    text = page({"checkpoint": result})
    assert "| one process over two, one thread each | 10.00 s / 6.00 s | 1.67 | at least 1.8 | missed |" in text
    assert "| the same, each less its start | 9.00 s / 4.50 s | 2.00 |  |  |" in text
    assert "500 MB, 600 MB / 700 MB |  | 0.86 | at most 1 | met |" in text
