"""Run a guard that is killed before its Nth operation on a file, for N = 1, 1 + EVERY, ..., and resume it each time.

    python -m tests.killed_runs SOURCE OUT_DIR METHOD [EVERY]

A process of its own: it forks for each run, so it must not have computed anything before.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from qcbguard_plugins import Calibration, Guard, guard_checkpoint
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.plan import make_plan
from qcbguard_plugins.report.model import MANIFEST_FILE, read_manifest

_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


def run(source: Path, target: Path, method: str, kill_at: int | None = None) -> int:
    """Guard in a forked process; return its exit status, the negative signal where one ended it."""
    pid = os.fork()
    if pid == 0:
        if kill_at is not None:
            _kill_before(kill_at, target.parent)
        guard = Guard(get_defense(method), seed=7, calibration=Calibration(num_sequences=2, sequence_length=16))
        guard_checkpoint(source, target, ["nf4"], guard)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
    report = read_manifest(folder).model_copy(update={"created": "", "elapsed_s": 0.0})
    return {**files, MANIFEST_FILE: report.model_dump_json().encode()}


def main() -> None:
    """Print the number of places where the run was killed and resumed."""
    source, out_dir, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    make_plan(source, "nf4")  # imports what it needs, so that the forks do not
    assert run(source, out_dir / "whole", method) == 0
    expected = contents(out_dir / "whole")
    every = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    num_killed, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        kill_at = 1 + num_killed * every
        num_killed += 1
        target = out_dir / "killed" / "guarded"
        target.parent.mkdir()
        status = run(source, target, method, kill_at)
        if not target.exists():
            assert status == -signal.SIGKILL, f"ended with {status} before operation {kill_at}"
            assert run(source, target, method) == 0, f"not resumed after operation {kill_at}"
            assert [path.name for path in target.parent.iterdir()] == [target.name]
        assert contents(target) == expected, f"other bytes after a kill at operation {kill_at}"
        shutil.rmtree(target.parent)
    print(num_killed - 1)


if __name__ == "__main__":
    main()
