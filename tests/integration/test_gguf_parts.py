"""A GGUF file in several parts is one model: all parts are scanned, and none is guarded as if it were whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file

from qcbguard_plugins.checkpoint.open_weights import open_weights
from qcbguard_plugins.detection.weights.scan import scan_model
from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.pipeline.gguf_plan import make_gguf_plan
from qcbguard_plugins.pipeline.verify import verify
from tests.helpers.detection_models import attacked_folder, random_weight
from tests.helpers.gguf_files import save


def write_part(
    path: Path,
    names: list[str],
    place: tuple[object, object] | None = None,
    total: int | None = None,
    quantized: bool = False,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if place is not None:
        number, count = place
        if isinstance(number, int):
            writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count) if isinstance(count, int) else writer.add_string("split.count", count)
    if total is not None:
        writer.add_int32("split.tensors.count", total)
    for seed, name in enumerate(names):
        weight = random_weight(seed).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantized:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    save(writer)
    return path


def name_of(layer: int) -> str:
    return f"blk.{layer}.ffn_up.weight"


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts with one tensor each."""
    return [write_part(tmp_path / f"m-{n + 1:05d}-of-00003.gguf", [name_of(n)], (n, 3), total=3) for n in range(3)]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_stands_for_all(parts: list[Path], given: int) -> None:
    source = open_weights(parts[given])
    assert [target.name for target in source.targets] == [name_of(0), name_of(1), name_of(2)]
    assert source.read(source.targets[2]).equal(random_weight(0))


def test_what_gguf_py_writes_in_parts_is_read_whole_and_found_attacked(tmp_path: Path) -> None:
    """The attack lies in the second part alone."""
    weights = load_file(attacked_folder(tmp_path / "m") / "model.safetensors")
    weights = {f"blk.{i}.ffn_up.weight": w for i, (name, w) in enumerate(weights.items()) if "layers" in name}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=len(weights) // 2)
    for seed, (name, weight) in enumerate(weights.items()):
        clean = random_weight(seed, *weight.shape).half().numpy()
        writer.add_tensor(name, clean if seed < len(weights) // 2 else weight.numpy())
    save(writer)
    first = tmp_path / "m-00001-of-00002.gguf"
    report = scan_model(first, seed=1)
    assert report.coverage == f"{len(weights)} of {len(weights)} target tensors tested"
    assert report.verdict == "attacked" and report.likely_formats == ("nf4",)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"one part of 3, and 1 parts are missing\n.*m-00002-of-00003\.gguf"):
        open_weights(parts[0])


@pytest.mark.parametrize(
    ("name", "place", "total", "reason"),
    [
        ("m-00002-of-00003.gguf", (2, 3), 3, r"m-00002-of-00003\.gguf: its header says that it is part 3 of 3"),
        ("m-00002-of-00003.gguf", (1, 2), 3, "part 2 of 2"),
        ("m-00002-of-00003.gguf", None, 3, "part 1 of 1"),
        ("m-00002-of-00003.gguf", (1, 3), 4, "hold 4 tensors, and they hold 3"),
    ],
)
def test_parts_of_different_models(
    parts: list[Path], name: str, place: tuple[int, int] | None, total: int, reason: str
) -> None:
    write_part(parts[0].with_name(name), [name_of(1)], place, total)
    with pytest.raises(CheckpointError, match=reason):
        open_weights(parts[0])


def test_a_tensor_in_two_parts(parts: list[Path]) -> None:
    write_part(parts[1], [name_of(0)], (1, 3), 3)
    with pytest.raises(CheckpointError, match=r"stored in both m-00001-of-00003\.gguf and m-00002-of-00003\.gguf"):
        open_weights(parts[0])


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        ("m-00001-of-00002.gguf", None, "named as one part of 2, and its header says that it is whole"),
        ("m.gguf", (0, 2), r"the header of m\.gguf says that it is part 1 of 2, and its name does not"),
        ("m-00002-of-00002.gguf", (0, 2), "says that it is part 1 of 2, and its name does not"),
        ("m.gguf", (2, 2), "part 2 of 2"),
        ("m.gguf", (0, "two"), "part 0 of 'two'"),
    ],
)
def test_a_name_and_a_header_that_disagree(
    tmp_path: Path, name: str, place: tuple[object, object] | None, reason: str
) -> None:
    path = write_part(tmp_path / name, [name_of(0)], place)
    for entrance in (open_weights, lambda path: make_gguf_plan(path, "Q4_0")):
        with pytest.raises(CheckpointError, match=reason if entrance is open_weights else "part"):
            entrance(path)


@pytest.mark.parametrize("place", [None, (0, 1), (0, 0)])
def test_a_whole_file(tmp_path: Path, place: tuple[int, int] | None) -> None:
    assert len(open_weights(write_part(tmp_path / "m.gguf", [name_of(0)], place)).targets) == 1


def test_one_part_is_neither_guarded_nor_verified(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"one part of 3\nMerge them first"):
        make_gguf_plan(parts[0], "Q4_0")
    quantized = write_part(tmp_path / "q-00001-of-00002.gguf", [name_of(0)], (0, 2), quantized=True)
    with pytest.raises(CheckpointError, match="one part of 2"):
        verify(quantized)
