"""Run the user's own ``convert_hf_to_gguf.py``, guarded in flight.

The script is run as it is, whether it stands on llama.cpp's ``conversion`` package or is the older single file. Both
write through one class, ``GGUFWriter`` of the gguf package, and there the weights are guarded: every name, shape and
type is final, and each tensor is still read only when its bytes are due.
"""

from __future__ import annotations

import runpy
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.errors import CheckpointError, TargetExistsError, UsageError
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.gguf_guard import report_bytes, require_data_free
from qcbguard_plugins.pipeline.gguf_plan import GgufPlan
from qcbguard_plugins.pipeline.guard_target import guard_target
from qcbguard_plugins.pipeline.report import report_of
from qcbguard_plugins.pipeline.settings import Guard


def convert_guarded(
    script: Path | str, arguments: Sequence[str], make_plan: Callable[[Path], GgufPlan], guard: Guard
) -> tuple[GuardReport, Path]:
    """Convert a Hugging Face folder with llama.cpp's script, and guard what it writes.

    Args:
        script: ``convert_hf_to_gguf.py`` of the user's llama.cpp.
        arguments: The script's own arguments.
        make_plan: Plans a GGUF file of which only the header is written:
            :func:`~qcbguard_plugins.pipeline.gguf_plan.make_gguf_plan` with all but its first argument.
        guard: The method; one that needs no calibration.

    Returns:
        The report, which the file carries too, and the path of the file.

    Raises:
        UsageError, UnguardableError, TargetExistsError, MissingDependencyError: As their names say; no file is made.
        CheckpointError: The script failed, or wrote no weights.
    """
    script = Path(script)
    if not script.is_file():
        raise UsageError(f"{script} is not a file", remedy="Name the convert_hf_to_gguf.py of your llama.cpp.")
    require_data_free(guard)
    run = _Hook(make_plan, guard)
    try:
        with _as_script(script, arguments), run.hooked():
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise CheckpointError(f"{script.name} stopped with exit code {stop.code}") from stop
    finally:
        run.discard()
    if run.report is None or run.target is None:
        raise CheckpointError(f"{script.name} wrote no weights, so nothing was guarded")
    return run.report, run.target


@contextmanager
def _as_script(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """The module path and arguments that the script would have if it were started itself.

    The script's tree brings a gguf package of its own, which is newer than one that may be installed and must win.
    """
    folder = script.resolve().parent
    paths = [str(folder)] + ([str(folder / "gguf-py")] if (folder / "gguf-py" / "gguf").is_dir() else [])
    loaded = sys.modules.get("gguf")
    if loaded is not None and len(paths) > 1 and not str(loaded.__file__).startswith(paths[1]):
        raise UsageError(
            "another gguf package is loaded already in this process",
            remedy="Convert in a process of its own: qcbguard convert-hf-to-gguf.",
        )
    old_path, old_arguments = sys.path[:], sys.argv
    sys.path[:0] = paths
    sys.argv = [str(script), *arguments]
    try:
        yield
    finally:
        sys.path[:], sys.argv = old_path, old_arguments


class _Hook:
    """Follows one writer from its header to its last tensor."""

    def __init__(self, make_plan: Callable[[Path], GgufPlan], guard: Guard) -> None:
        self.make_plan, self.guard = make_plan, guard.with_seed()
        self.plan: GgufPlan | None = None
        self.records: list[TensorRecord] = []
        self.started = time.monotonic()
        self.target: Path | None = None
        self.partial: Path | None = None
        self.report: GuardReport | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Step in where the writer opens its file, lists its tensors and closes."""
        import gguf

        writer = gguf.GGUFWriter
        names = ("write_header_to_file", "write_ti_data_to_file", "close")
        original = {name: getattr(writer, name) for name in names}
        hook = self

        def write_header_to_file(self: Any, path: Path | None = None) -> None:
            original["write_header_to_file"](self, hook.begin(self, path))

        def write_ti_data_to_file(self: Any) -> None:
            original["write_ti_data_to_file"](self)
            hook.wrap_tensors(self)

        def close(self: Any) -> None:
            original["close"](self)
            hook.finish()

        for function in (write_header_to_file, write_ti_data_to_file, close):
            setattr(writer, function.__name__, function)
        try:
            yield
        finally:
            for name, own in original.items():
                setattr(writer, name, own)

    def begin(self, writer: Any, path: Path | None) -> Path | None:
        """Reserve room for the report, and send the output to a temporary name."""
        if not any(writer.tensors):
            return path
        if len(writer.tensors) > 1 or writer.temp_file is not None or path is None:
            raise UsageError(
                "splitting and temporary files cannot be guarded in flight", remedy="Leave those flags out."
            )
        if writer.endianess.name == "BIG":
            raise UsageError("a big-endian file cannot be guarded", remedy="Leave --bigendian out.")
        self.target = Path(path)
        if self.target.exists() or self.target.is_symlink():
            raise TargetExistsError(f"{self.target} exists already", remedy="Name another with --outfile.")
        writer.add_string(GGUF_PROVENANCE_KEY, " " * report_bytes(writer.tensors[0]))
        self.partial = self.target.with_name(f".{self.target.name}.partial-{secrets.token_hex(4)}")
        return self.partial

    def wrap_tensors(self, writer: Any) -> None:
        """Plan from the header that was just written, and guard each target when its bytes are due."""
        if self.partial is None:
            return
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        file.flush()
        skeleton = self.partial.with_name(self.partial.name + ".header")
        try:
            # The header with a hole where the tensors will be: what a plan reads, and llama-quantize --dry-run too.
            shutil.copyfile(self.partial, skeleton)
            num_bytes = sum(info.nbytes + 64 for info in writer.tensors[0].values())
            with skeleton.open("r+b") as stream:
                stream.truncate(skeleton.stat().st_size + num_bytes)
            self.plan = self.make_plan(skeleton)
        finally:
            skeleton.unlink(missing_ok=True)
        for target in self.plan.targets:
            info = writer.tensors[0][target.name]
            info.tensor = _Due(info.tensor, info.nbytes, self._guarded(self.plan, target))

    def _guarded(self, plan: GgufPlan, target: Target) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
        shape = plan.file.tensors[target.name].shape

        def guarded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            raw = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy())
            stored = raw.view(target.dtype).view(shape)
            weight, record = guard_target(target, stored, self.guard, overwrite=True)
            self.records.append(record)
            return weight.contiguous().view(-1).view(torch.uint8).numpy()

        return guarded

    def finish(self) -> None:
        """Write the report into the room reserved for it, and give the file its name."""
        if self.partial is None or self.target is None or self.plan is None:
            return
        report = report_of(replace(self.plan, source=self.target.name), self.guard, self.records, self.started)
        _, end = open_gguf(self.partial).spans[GGUF_PROVENANCE_KEY]
        room = report_bytes(self.plan.file.tensors)
        with self.partial.open("r+b") as file:
            file.seek(end - room)
            file.write(report.model_dump_json().encode().ljust(room))
        if self.target.exists():
            raise TargetExistsError(f"{self.target} was made by somebody else meanwhile", remedy="Give another name.")
        self.partial.rename(self.target)
        self.partial, self.report = None, report

    def discard(self) -> None:
        """Leave nothing behind of a run that did not finish."""
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)


class _Due:
    """Stands for a tensor until the writer asks for its bytes."""

    def __init__(
        self, tensor: Any, nbytes: int, guarded: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
    ) -> None:
        self.tensor, self.nbytes, self.guarded = tensor, nbytes, guarded

    def tofile(self, file: BinaryIO) -> None:
        """Compute and write."""
        lazy = getattr(type(self.tensor), "to_eager", None)
        values = self.tensor if lazy is None else lazy(self.tensor)
        self.guarded(np.asarray(values)).tofile(file)
