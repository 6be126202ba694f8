"""Make something that is killed before its Nth operation on a file, for N = 1, 1 + EVERY, ..., and resume it each time.

    python -m tests.helpers.killed_runs folder|gguf|cache SOURCE OUT_DIR METHOD [EVERY]

A process of its own: it makes the whole thing once, with one thread, and forks for each run that is killed or resumed,
so that they find the libraries and kernels loaded. None of its threads may outlive the first run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from qcbguard_plugins import Calibration, Guard, guard_checkpoint
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, GuardReport, read_manifest
from qcbguard_plugins.defenses import get_defense

_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


@dataclass(frozen=True)
class Kind:
    """Something that a run makes.

    Attributes:
        make: Makes it from a source under a name.
        contents: All its bytes, its report without the two times.
        is_made: Whether it has its name.
    """

    make: Callable[[Path, Path, Guard], object]
    contents: Callable[[Path], dict[str, bytes]]
    is_made: Callable[[Path], bool] = Path.exists


def run(kind: Kind, source: Path, target: Path, method: str, kill_at: int | None = None) -> int:
    """Make it in a forked process; return its exit status, the negative signal where one ended it."""
    pid = os.fork()
    if pid == 0:
        if kill_at is not None:
            _kill_before(kill_at, target.parent)
        make(kind, source, target, method)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make(kind: Kind, source: Path, target: Path, method: str) -> None:
    calibration = Calibration(num_sequences=2, sequence_length=16)
    kind.make(source, target, Guard(get_defense(method), seed=7, calibration=calibration))


def _kill_before(kill_at: int, inside: Path) -> None:
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in _OPERATIONS and str(args[0]).startswith(str(inside)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes of a folder, and its manifest without the two times."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {**files, MANIFEST_FILE: _timeless(read_manifest(folder))}


def gguf_contents(path: Path) -> dict[str, bytes]:
    """A GGUF file's tensors and its report without the two times."""
    from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
    from qcbguard_plugins.checkpoint.manifest import read_report
    from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY

    file = open_gguf(path)
    tensors = {name: bytes(file.read_bytes(name)) for name in file.tensors}
    report = read_report(file.metadata[GGUF_PROVENANCE_KEY], "the report")
    return {**tensors, "report": _timeless(report), "size": str(path.stat().st_size).encode()}


def _timeless(report: GuardReport) -> bytes:
    return report.model_copy(update={"created": "", "elapsed_s": 0.0}).model_dump_json().encode()


def _cache_entry(cache_dir: Path) -> dict[str, bytes]:
    """The files of the only entry; hidden folders are work in the making."""
    return {path.name: path.read_bytes() for path in cache_dir.glob("[!.]*/guarded.*")}


def _guard_gguf(source: Path, target: Path, guard: Guard) -> None:
    from qcbguard_plugins.pipeline.gguf_guard import guard_gguf

    guard_gguf(source, target, "Q4_0", guard)


def _guarded_load(source: Path, cache_dir: Path, guard: Guard) -> None:
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    from qcbguard_plugins import GuardedBitsAndBytesConfig

    config = GuardedBitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", guard=replace(guard, cache_dir=cache_dir)
    )
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


KINDS = {
    "folder": Kind(lambda source, target, guard: guard_checkpoint(source, target, ["nf4"], guard), contents),
    "gguf": Kind(_guard_gguf, gguf_contents),
    "cache": Kind(_guarded_load, _cache_entry, lambda cache_dir: bool(_cache_entry(cache_dir))),
}


def main() -> None:
    """Print the number of places where the run was killed and resumed."""
    kind, source, out_dir, method = KINDS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    every = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # else a thread watches the first progress bar for ever
    make(kind, source, out_dir / "whole", method)
    assert threading.active_count() == 1, "a fork has no copy of a thread, and may wait for it for ever"
    expected = kind.contents(out_dir / "whole")
    assert expected
    num_killed, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        kill_at = 1 + num_killed * every
        num_killed += 1
        target = out_dir / "killed" / "guarded"
        target.parent.mkdir()
        status = run(kind, source, target, method, kill_at)
        if not kind.is_made(target):
            assert status == -signal.SIGKILL, f"ended with {status} before operation {kill_at}"
            assert run(kind, source, target, method) == 0, f"not resumed after operation {kill_at}"
            assert [path.name for path in target.parent.iterdir()] == [target.name]
        assert kind.contents(target) == expected, f"other bytes after a kill at operation {kill_at}"
        shutil.rmtree(target.parent)
    print(num_killed - 1)


if __name__ == "__main__":
    main()
