"""The page about speed: every ratio beside its goal, and the notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[tuple[str, ...]]


def row(what: str, seconds: tuple[float, float] | None, ratio: float, goal: float | None, *, at_most: bool = True):
    """One ratio beside its goal."""
    times = f"{seconds[0]:.2f} s / {seconds[1]:.2f} s" if seconds else ""
    if goal is None:
        return what, times, f"{ratio:.2f}", "", ""
    is_met = ratio <= goal if at_most else ratio >= goal
    return (
        what,
        times,
        f"{ratio:.2f}",
        f"{'at most' if at_most else 'at least'} {goal:g}",
        "met" if is_met else "missed",
    )


def tensor_rows(result: dict[str, Any]) -> Rows:
    """Guard over bitsandbytes, tensor by tensor."""
    return [
        row(
            f"{each['format']}, {each['dtype']}",
            (each["guard_s"], each["stock_s"]),
            each["guard_s"] / each["stock_s"],
            None if each["format"] == "int8" else 0.5,
        )
        for each in result["rows"]
    ]


def checkpoint_rows(result: dict[str, Any]) -> Rows:
    """A whole checkpoint beside a copy of it, and by two processes."""
    seconds = {job: values["elapsed_s"] for job, values in result["jobs"].items()}
    one, two, both = (
        seconds[job]
        for job in ("one process, one thread", "two processes, one thread each", "one process, two threads")
    )
    start, start_of_two = seconds["start of one process"], seconds["start of two processes"]
    copy, own, own_of_two = seconds["plain copy"], one - start, two - start_of_two
    largest, peak = result["largest_tensor_bytes"], result["jobs"]["one process, one thread"]["peak_bytes"]
    room = 2 * largest + 500e6
    return [
        row(f"guard, {result['gigabytes']:g} GB, two threads, over a plain copy", (both, copy), both / copy, 2),
        row("the same less the start", (both - start, copy), (both - start) / copy, None),
        row("one process over two, one thread each", (one, two), one / two, 1.8, at_most=False),
        row("the same, each less its start", (own, own_of_two), own / own_of_two, None),
        row(f"peak of one thread over twice the largest tensor and 500 MB, {peak / 1e6:.0f} MB / {room / 1e6:.0f} MB",
            None, peak / room, 1),
    ]  # fmt: skip


def gguf_rows(result: dict[str, Any]) -> Rows:
    """The guard's own part over llama-quantize's whole time, and whole over whole."""
    rows = []
    for each in result["rows"]:
        own, whole, stock = each["own_s"], each["guard_s"], each["stock_s"]
        rows.append(row(f"{each['recipe']}, own part", (own, stock), own / stock, 1))
        rows.append(row(f"{each['recipe']}, whole run", (whole, stock), whole / stock, None))
    return rows


def calibrated_rows(result: dict[str, Any]) -> Rows:
    """Time and divergence beside GPTQModel's."""
    guard, stock = result["guard"], result["stock"]
    return [
        row("feedback over GPTQModel, time", (guard["elapsed_s"], stock["elapsed_s"]),
            guard["elapsed_s"] / stock["elapsed_s"], 1),
        row(f"divergence of the guarded weights, {guard['kl']:.5f} / {stock['kl']:.5f} nats", None,
            guard["kl"] / stock["kl"], 1),
        row(f"of what GPTQModel makes of them, {guard['stored_kl']:.5f} / {stock['kl']:.5f} nats", None,
            guard["stored_kl"] / stock["kl"], 1),
    ]  # fmt: skip


SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], Rows]]] = {
    "tensors": (
        "One weight, data-free",
        "`stochastic` on a 4096x4096 weight beside bitsandbytes' own quantizer of the same weight, medians. The guard "
        "reads the weight, finds block scales and neighbours, draws, writes the new weight and hashes its codes. "
        "8 bits have no goal: bitsandbytes rounds them in one short operation.",
        tensor_rows,
    ),
    "checkpoint": (
        "A checkpoint, data-free",
        "A Llama of random bfloat16 weights in shards, guarded for NF4 and verified, beside a copy of the folder; both "
        "flush what they wrote to the disk. The start is everything before the first weight: the imports of torch, "
        "transformers and bitsandbytes, and the plan; with two processes the launcher's own imports too.",
        checkpoint_rows,
    ),
    "gguf": (
        "A GGUF file, data-free",
        "Beside `llama-quantize` of the same F16 file on as many threads, medians of five runs in turn. The guard's "
        "own part is all that is not reading and writing files; its whole run writes a file that is 2 to 7 times as "
        "large as llama-quantize's and flushes it to the disk, which that one does not do.",
        gguf_rows,
    ),
    "calibrated": (
        "Calibrated: feedback beside GPTQModel",
        "The same clean model, the same calibration tokens, 4 bits in groups of 128; each in this run. Divergence is "
        "that from full precision on held-out text; the guard's figures are means over two seeds.",
        calibrated_rows,
    ),
    "gpu": ("One weight on a GPU, data-free", "As the first table, beside bitsandbytes' CUDA kernels.", tensor_rows),
}


def page(results: dict[str, Any]) -> str:
    """The Markdown of the results."""
    lines = [
        "# Performance",
        "",
        "Written by `make bench` (`python -m benchmarks.performance`), which runs every benchmark and fills in what it",
        "measured. Times are the guard's and then the other's, the ratio is the first over the second.",
    ]
    for part, (title, text, rows_of) in SECTIONS.items():
        result = results.get(part, {"skipped": "not run"})
        lines += ["", f"## {title}", "", text, ""]
        if "skipped" in result:
            lines.append(f"Not measured: {result['skipped']}.")
            continue
        lines += [f"Machine: {result['machine']}; commit {result['commit']}.", ""]
        lines += ["| what | times | ratio | goal | |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows_of(result)]
    notes = Path(__file__).with_name("performance_notes.md")
    return "\n".join([*lines, "", notes.read_text(encoding="utf-8").rstrip(), ""])
