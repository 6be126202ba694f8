"""What exporters wrote, compared with a plan: every code of every tensor must be the planned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from qcbguard_plugins.backends.base import StoredCodes
from qcbguard_plugins.checkpoint.manifest import GuardReport, TensorRecord, TensorVerdict, read_manifest
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.rounding.digests import codes_digest


class ExportedCodes(StoredCodes):
    """The integer weights of an exported model, by the dotted name of their layers."""

    def __init__(self, backend: str, path: Path, read: Callable[[Path], dict[str, Tensor]]) -> None:
        """Open an export.

        Args:
            backend: Name of the backend, which its formats start with.
            path: The file or folder, beside which or in which the manifest lies.
            read: Reads the codes, uint8 ``[out_features, in_features]`` by layer name.
        """
        self.path, self._backend, self._read = path, backend, read
        self._codes: dict[str, Tensor] = {}

    def find_plan(self, plan: Path | None) -> GuardReport:
        report = read_manifest(plan or (self.path.parent if self.path.is_file() else self.path))
        if not any(name.startswith(f"{self._backend}:") for name in report.formats):
            raise UsageError(f"the plan is for {', '.join(report.formats)} and not for {self._backend}")
        self._codes = self._read(self.path)
        return report

    def compare(self, record: TensorRecord) -> TensorVerdict:
        reason = self._why_not_as_planned(record)
        return TensorVerdict(name=record.name, as_planned=not reason, reason=reason)

    def quantized(self) -> Iterable[str]:
        return [f"{layer}.weight" for layer in self._codes]

    def _why_not_as_planned(self, record: TensorRecord) -> str:
        codes = self._codes.get(record.name.removesuffix(".weight"))
        if codes is None:
            return "not quantized"
        if tuple(codes.shape) != record.shape:
            return f"stored with shape {tuple(codes.shape)}"
        return "" if codes_digest(codes) == record.codes_sha256 else "other codes than planned"
