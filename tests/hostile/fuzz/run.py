"""Fuzz one target, or several side by side, with atheris.

    python -m tests.hostile.fuzz.run journal --minutes 60
    python -m tests.hostile.fuzz.run all --minutes 60 --json fuzz.json

The corpus of a target is kept under ``--work-dir`` and goes on growing. An error that is not the package's own is a
finding: its traceback stands in the target's log, the input that did it beside it, and the program exits 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

_INSTRUMENTED = ["qcbguard_plugins", "gguf", "yaml"]
_SECONDS_PER_INPUT = 25
_MEGABYTES = 4096
# How often an input is changed by the target's own rules and not by libFuzzer's.
_OWN_MUTATIONS = 0.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="targets, or 'all'")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--work-dir", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one-by-one", action="store_true", help="one target after the other")
    arguments = parser.parse_args()

    import atheris
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tests.hostile.fuzz.targets import TARGETS

        _import_what_targets_import()
    names = list(TARGETS) if arguments.names == ["all"] else arguments.names
    unknown = sorted(set(names) - TARGETS.keys())
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; targets: {', '.join(TARGETS)}, all")
    figures, running = {}, {}
    # The files of an input are written thousands of times; memory spares the disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        for name in names:
            files = Path(scratch) / name
            files.mkdir()
            running[name] = _start(name, arguments.work_dir / name, files, arguments.minutes * 60)
            if arguments.one_by_one:
                figures[name] = _finish(name, arguments.work_dir / name, running.pop(name))
        figures |= {name: _finish(name, arguments.work_dir / name, pid) for name, pid in running.items()}
    figures = {name: {"minutes": arguments.minutes, **figure} for name, figure in figures.items()}
    for name, figure in figures.items():
        print(name, json.dumps(figure))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if any(figure["findings"] for figure in figures.values()) else 0


def _import_what_targets_import() -> None:
    """Instrumented once, before the targets get processes of their own."""
    import bitsandbytes
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    import qcbguard_plugins.backends.bitsandbytes.stock
    import qcbguard_plugins.backends.formats
    import qcbguard_plugins.checkpoint.gguf_source
    import qcbguard_plugins.detection.behaviour.prompts
    import qcbguard_plugins.hooks.transformers.calibrated_cache
    import qcbguard_plugins.lab.bench.profile
    import qcbguard_plugins.lab.bench.rows
    import qcbguard_plugins.pipeline.guard
    import qcbguard_plugins.pipeline.verify
    import tests.helpers.gguf_files

    assert bitsandbytes and transformers and LlamaConfig and LlamaForCausalLM and tests and qcbguard_plugins


def _start(name: str, folder: Path, files: Path, seconds: float) -> int:
    """Fuzz in a process of its own; return its number."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _fuzz(name, folder, files, seconds)
    return pid


def _fuzz(name: str, folder: Path, files: Path, seconds: float) -> None:
    """Fuzz with the target's files in a folder of their own; does not return."""
    import atheris

    from tests.hostile.fuzz.registry import MAX_BYTES
    from tests.hostile.fuzz.targets import TARGETS

    target = TARGETS[name]
    prepared = target.prepare(files)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(prepared.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    refused = 0
    found: set[str] = set()

    def run(content: bytes) -> None:
        nonlocal refused
        try:
            refused += prepared.run(content) is not None
        except Exception as error:  # a finding; each place counts once, and the run goes on
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} {place.filename}:{place.lineno}"
            if where not in found:
                found.add(where)
                traceback.print_exc()
                (folder / f"crash-{len(found)}").write_bytes(content)

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < _OWN_MUTATIONS:
            return target.mutate(content, max_size, rng)
        return bytes(atheris.Mutate(content, max_size))

    def tell(*_: object) -> None:
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        (folder / "own.json").write_text(json.dumps({"refused": refused, "cpu_s": cpu.ru_utime + cpu.ru_stime}))

    # atheris leaves without running handlers of exits; a timer writes the figures that it does not know.
    signal.signal(signal.SIGVTALRM, tell)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.5, 1.0)
    options = {
        "max_total_time": max(1, round(seconds)),
        "max_len": MAX_BYTES,
        "timeout": _SECONDS_PER_INPUT,
        "rss_limit_mb": _MEGABYTES,
        "print_final_stats": 1,
        "artifact_prefix": f"{folder}/",
    }
    flags = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup([name, *flags, str(corpus)], run, custom_mutator=mutate)
    atheris.Fuzz()


def _finish(name: str, folder: Path, pid: int) -> dict[str, float | int | list[str]]:
    """Wait for a target and read its figures from its log."""
    start = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log = (folder / "log").read_text(errors="replace")
    own = json.loads((folder / "own.json").read_text()) if (folder / "own.json").exists() else {}
    findings = [path.name for path in sorted(folder.iterdir()) if path.name.startswith(("crash-", "timeout-", "oom-"))]
    if status and not findings:
        findings = [f"ended with {status}"]
    if findings:
        print(f"--- {name}, {folder}\n{log[-4000:]}", file=sys.stderr)
    return {
        "executions": _last(r"stat::number_of_executed_units:\s*(\d+)", log) or _last(r"^#(\d+)", log),
        "edges": _last(r"cov: (\d+)", log),
        "features": _last(r"ft: (\d+)", log),
        "corpus": len(list((folder / "corpus").iterdir())),
        "waited_s": round(time.monotonic() - start),
        **own,
        "findings": findings,
    }


def _last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text, re.MULTILINE)
    return int(found[-1]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
