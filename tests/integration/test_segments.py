"""A tensor that passes through memory in segments ends as one that is guarded as a whole, and nothing slips through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcbguard_plugins import FlipGuard, Guard, Stochastic, guard_checkpoint, verify_checkpoint
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint import FolderStaging, partial_of
from qcbguard_plugins.checkpoint.journal import hash_bytes
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import UnguardableError, VerificationError
from qcbguard_plugins.rounding.digests import codes_digest
from qcbguard_plugins.rounding.guard_weight import guard_weight

SEED = 11


@pytest.fixture(params=[1, 3], ids=lambda number: f"{number} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments for each tensor of a small model, the last of them shorter."""
    monkeypatch.setattr("qcbguard_plugins.rounding.guard_weight._WEIGHTS_PER_SEGMENT", 3000)


@pytest.mark.parametrize("method", [Stochastic(), FlipGuard(0.5)], ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["nf4", "fp4-b128", "int8"])
def test_segments_are_those_of_the_whole_weight(
    name: str, method: Defense, threads: int, folder: Path, tmp_path: Path
) -> None:
    report = guard_checkpoint(folder, tmp_path / "guarded", [name], Guard(method, seed=SEED))
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "guarded" / "model.safetensors")
    assert torch.get_num_threads() == threads
    for record in report.tensors:
        whole = guard_weight(before[record.key], get_grid(name), method, seed=SEED, name=record.name)
        assert torch.equal(after[record.key], whole.weight), record.name
        assert record.codes_sha256 == codes_digest(whole.codes)
        assert (record.num_moved, record.num_frozen) == (whole.num_moved, whole.num_frozen)
        assert record.relative_change == whole.relative_change
    assert verify_checkpoint(tmp_path / "guarded").clean


def test_a_disk_that_changes_a_weight_is_found_out(
    threads: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is read back from the file, whatever the memory still holds."""
    original = FolderStaging.write_part
    spoilt = "model.layers.1.mlp.up_proj.weight"

    def write_part(self: FolderStaging, key: str, first: int, part: Tensor) -> None:
        if key == spoilt and first > 0:
            part = part.clone()
            part[5] = -4 * part[5] + 1
        original(self, key, first, part)

    monkeypatch.setattr(FolderStaging, "write_part", write_part)
    with pytest.raises(VerificationError, match=spoilt):
        guard_checkpoint(folder, tmp_path / "guarded", ["nf4"], Guard(Stochastic(), seed=SEED))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_weight_that_is_not_finite_ends_the_run(threads: int, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].view(-1)[7000] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnguardableError, match=r"layers\.0\.mlp\.up_proj\.weight.*NaN or infinity"):
        guard_checkpoint(folder, tmp_path / "guarded", ["nf4"], Guard(Stochastic(), seed=SEED))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_journal_has_the_hashes_of_whole_tensors(
    threads: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run compares them with what it reads, whatever the segments then."""
    noted = {}
    original = FolderStaging.finish

    def finish(self: FolderStaging, key: str, source: str, guarded: str, record: object) -> None:
        noted[key] = (source, guarded)
        original(self, key, source, guarded, record)

    monkeypatch.setattr(FolderStaging, "finish", finish)
    guard_checkpoint(folder, tmp_path / "guarded", ["nf4"], Guard(Stochastic(), seed=SEED))
    for number, made in enumerate((folder, tmp_path / "guarded")):
        for key, weight in load_file(made / "model.safetensors").items():
            if key in noted:
                assert noted[key][number] == hash_bytes(memoryview(weight.numpy().tobytes())), key
    assert not partial_of(tmp_path / "guarded").exists()
