"""A run that is interrupted goes on where it stopped, and ends with the same bytes; nothing half-written has a name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import pytest
import torch

from qcbguard_plugins import Calibration, Feedback, Guard, QuantGuard, Stochastic, guard_checkpoint, verify_checkpoint
from qcbguard_plugins.checkpoint import FolderStaging, partial_of
from qcbguard_plugins.cli import main
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import CheckpointError, TargetExistsError, UsageError
from tests.conftest import ROOT
from tests.helpers.gguf_files import write_model
from tests.helpers.killed_runs import contents

GUARD = Guard(Stochastic(), seed=3)


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, **options
    )


class _Interrupted(BaseException):
    """Stands for what no handler of ours catches."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """End every run after some tensors, once called."""
    original = FolderStaging.finish

    def after(num_tensors: int) -> None:
        left = num_tensors

        def finish(self: FolderStaging, *args: object) -> None:
            nonlocal left
            if left == 0:
                monkeypatch.setattr(FolderStaging, "finish", original)
                raise _Interrupted
            left -= 1
            original(self, *args)

        monkeypatch.setattr(FolderStaging, "finish", finish)

    return after


@pytest.mark.parametrize(
    ("kind", "shape", "method", "every"),
    [
        ("folder", "llama-one-block", "stochastic", 1),
        ("folder", "gpt2", "feedback", 4),
        ("gguf", "", "stochastic", 3),
        ("cache", "llama-fp32", "feedback", 20),
    ],
    ids=str,
)
def test_a_run_killed_at_any_operation_on_a_file(
    kind: str, shape: str, method: str, every: int, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """SIGKILL before an opening, renaming or removal; each time a second run ends with the same bytes."""
    source = model_folder(shape) if shape else write_model(tmp_path / "model.gguf", hidden=64, ffn=64)
    result = run("-m", "tests.helpers.killed_runs", kind, str(source), str(tmp_path), method, str(every))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) > 20 // every


# NF4 leaves Mixtral's fused experts as they are, and the guard says so with 3.
_EXIT_CODES = {"data-free": 0, "calibrated": 3, "scan.json": 0}


@dataclass(frozen=True)
class _Launch:
    """Several commands in one launch of two processes: the launch takes longer than the commands do."""

    folder: Path
    output: str

    def commands(self, source: Callable[[str], Path], suffix: str) -> dict[str, list[str]]:
        """What is run, by the name of what it makes."""
        guards = {
            name: ["guard", str(source(shape)), "--for", "nf4", "--method", method, "--seed", "5", "--out"]
            for name, shape, method in (
                ("data-free", "llama-sharded", "stochastic"),
                ("calibrated", "mixtral", "feedback"),
            )
        }
        scan = ["scan", str(source("llama-sharded")), "--for", "nf4,int8", "--seed", "5", "--json"]
        return {name: [*command, str(self.folder / f"{name}-{suffix}")] for name, command in
                {**guards, "scan.json": scan}.items()}  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> _Launch:
    launch = _Launch(tmp_path_factory.mktemp("two"), "")
    commands = launch.folder / "commands.json"
    lines = launch.commands(model_folder, "two")
    commands.write_text(json.dumps([(line, _EXIT_CODES[name]) for name, line in lines.items()]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run(*torchrun, "-m", "tests.helpers.two_processes", str(commands))
    assert result.returncode == 0, result.stderr
    return replace(launch, output=result.stdout)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the launcher gives each process: with more, sums of the calibrated path and of scans end otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["data-free", "calibrated"])
def test_two_processes_make_the_same_bytes_as_one(
    name: str, two_processes: _Launch, model_folder: Callable[[str], Path]
) -> None:
    command = two_processes.commands(model_folder, "one")[name]
    assert main(command) == _EXIT_CODES[name]
    assert contents(Path(command[-1])) == contents(two_processes.folder / f"{name}-two")
    assert two_processes.output.count("target tensors guarded") == 2  # once for each of the two commands


@pytest.mark.usefixtures("one_thread")
def test_two_processes_scan_as_one(two_processes: _Launch, model_folder: Callable[[str], Path]) -> None:
    command = two_processes.commands(model_folder, "one")["scan.json"]
    assert main(command) == 0
    made = (Path(command[-1]), two_processes.folder / "scan.json-two")
    reports = [json.loads(path.read_text()) | {"created": "", "elapsed_s": 0} for path in made]
    assert reports[0] == reports[1]


class TestResumedRuns:
    @pytest.mark.parametrize("method", [Feedback(), QuantGuard(steps=2)], ids=lambda method: method.name)
    def test_a_method_that_looks_at_all_layers_chooses_as_if_never_interrupted(
        self, method: Defense, llama: Path, tmp_path: Path, interrupt: Callable[[int], None]
    ) -> None:
        guard = Guard(method, seed=3, calibration=Calibration(num_sequences=4, sequence_length=32))
        interrupt(5)
        with pytest.raises(_Interrupted):
            guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], guard)
        guard_checkpoint(llama, tmp_path / "guarded", ["nf4"], guard)
        guard_checkpoint(llama, tmp_path / "whole", ["nf4"], guard)
        assert contents(tmp_path / "guarded") == contents(tmp_path / "whole")

    def test_only_what_is_missing_is_guarded(
        self, llama: Path, tmp_path: Path, interrupt: Callable[[int], None]
    ) -> None:
        target = tmp_path / "guarded"
        interrupt(5)
        with pytest.raises(_Interrupted):
            guard_checkpoint(llama, target, ["nf4"], GUARD)
        assert not target.exists()
        (journal,) = partial_of(target).glob("journal-*")
        assert len(journal.read_text().splitlines()) == 5
        interrupt(9)  # the other nine of fourteen, and not one more
        guard_checkpoint(llama, target, ["nf4"], GUARD)
        interrupt(14)
        guard_checkpoint(llama, tmp_path / "whole", ["nf4"], GUARD)
        assert contents(target) == contents(tmp_path / "whole")

    @pytest.mark.parametrize("damage", ["torn journal", "changed weight", "foreign line", "empty shard"])
    def test_damaged_work_is_done_again(
        self, damage: str, llama: Path, tmp_path: Path, interrupt: Callable[[int], None]
    ) -> None:
        target = tmp_path / "guarded"
        interrupt(5)
        with pytest.raises(_Interrupted):
            guard_checkpoint(llama, target, ["nf4"], GUARD)
        partial = partial_of(target)
        (journal,) = partial.glob("journal-*")
        shard = partial / "folder" / "model.safetensors"
        if damage == "torn journal":
            journal.write_bytes(journal.read_bytes()[:-40])
        elif damage == "foreign line":
            journal.write_text('{"key": 1}\nnot JSON\n' + journal.read_text())
        elif damage == "empty shard":
            shard.write_bytes(b"")
        else:
            content = bytearray(shard.read_bytes())
            content[-len(content) // 2 :] = bytes(len(content) - len(content) // 2)
            shard.write_bytes(content)
        guard_checkpoint(llama, target, ["nf4"], GUARD)
        guard_checkpoint(llama, tmp_path / "whole", ["nf4"], GUARD)
        assert contents(target) == contents(tmp_path / "whole")

    def test_the_seed_that_was_drawn_is_kept(
        self, llama: Path, tmp_path: Path, interrupt: Callable[[int], None]
    ) -> None:
        target = tmp_path / "guarded"
        interrupt(5)
        with pytest.raises(_Interrupted):
            guard_checkpoint(llama, target, ["nf4"], "stochastic")
        report = guard_checkpoint(llama, target, ["nf4"], "stochastic")
        guard_checkpoint(llama, tmp_path / "whole", ["nf4"], Guard(Stochastic(), seed=report.seed))
        assert contents(target) == contents(tmp_path / "whole")
        assert verify_checkpoint(target).clean

    def test_another_request_is_refused_and_loses_nothing(
        self, llama: Path, tmp_path: Path, interrupt: Callable[[int], None]
    ) -> None:
        target = tmp_path / "guarded"
        interrupt(5)
        with pytest.raises(_Interrupted):
            guard_checkpoint(llama, target, ["nf4"], GUARD)
        before = sorted(path.name for path in partial_of(target).iterdir())
        with pytest.raises(
            UsageError, match=r"differs in formats, seed(.|\n)*then \['nf4'\], now \['int8'\](.|\n)*delete"
        ):
            guard_checkpoint(llama, target, ["int8"], Guard(Stochastic(), seed=4))
        assert sorted(path.name for path in partial_of(target).iterdir()) == before
        guard_checkpoint(llama, target, ["nf4"], GUARD)

    def test_a_source_that_changed_in_between_is_refused(
        self, llama: Path, tmp_path: Path, interrupt: Callable[[int], None]
    ) -> None:
        source, target = shutil.copytree(llama, tmp_path / "source"), tmp_path / "guarded"
        interrupt(5)
        with pytest.raises(_Interrupted):
            guard_checkpoint(source, target, ["nf4"], GUARD)
        os.utime(source / "model.safetensors", ns=(0, 0))
        with pytest.raises(UsageError, match="differs in source"):
            guard_checkpoint(source, target, ["nf4"], GUARD)


class TestTroubleDuringTheRun:
    def test_a_source_that_changes(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, target = shutil.copytree(llama, tmp_path / "source"), tmp_path / "guarded"
        original = FolderStaging.finish

        def finish(self: FolderStaging, *args: object) -> None:
            os.utime(source / "model.safetensors", ns=(0, 0))
            original(self, *args)

        monkeypatch.setattr(FolderStaging, "finish", finish)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            guard_checkpoint(source, target, ["nf4"], GUARD)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_second_run_on_the_same_target(self, llama: Path, tmp_path: Path) -> None:
        target = tmp_path / "guarded"
        partial_of(target).mkdir()
        with filelock.FileLock(partial_of(target) / "lock"), pytest.raises(TargetExistsError, match="another run"):
            guard_checkpoint(llama, target, ["nf4"], GUARD)
        guard_checkpoint(llama, target, ["nf4"], GUARD)

    def test_no_room_on_the_device(self, llama: Path, tmp_path: Path) -> None:
        """A limit on the size of files stands for the full disk: the system refuses the write in the same way."""
        target = tmp_path / "guarded"

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        command = ["-m", "qcbguard_plugins.cli", "guard", str(llama), "--for", "nf4", "--method", "stochastic"]
        command += ["--seed", "3", "--out", str(target)]
        failed = run(*command, preexec_fn=limit)
        assert failed.returncode == 2
        assert "cannot be written" in failed.stderr
        assert "Run the same command again to go on where it stopped" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not target.exists()
        assert main(command[2:]) == 0
        assert verify_checkpoint(target).clean

    def test_a_worker_that_dies(self, llama: Path, tmp_path: Path) -> None:
        """The others end as well, nothing has the target's name, and one process alone goes on with the work."""
        target = tmp_path / "guarded"
        code = (
            "import os, signal, sys\n"
            "from qcbguard_plugins.checkpoint import FolderStaging\n"
            "original = FolderStaging.finish\n"
            "def finish(self, *args):\n"
            "    original(self, *args)\n"
            "    if os.environ['RANK'] == '1':\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "FolderStaging.finish = finish\n"
            "from qcbguard_plugins.cli import run\n"
            "run()\n"
        )
        (tmp_path / "dying.py").write_text(code)
        command = ["guard", str(llama), "--for", "nf4", "--method", "stochastic", "--seed", "3", "--out", str(target)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "dying.py")]
        assert run(*launch, *command).returncode != 0
        assert not target.exists()
        journals = [path.read_text() for path in partial_of(target).glob("journal-1.jsonl")]
        assert [json.loads(line)["key"] for line in journals[0].splitlines()]
        assert main(command) == 0
        guard_checkpoint(llama, tmp_path / "whole", ["nf4"], GUARD)
        assert contents(target) == contents(tmp_path / "whole")
