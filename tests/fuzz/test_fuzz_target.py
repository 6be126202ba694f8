from __future__ import annotations

import random
from pathlib import Path

import pytest
from safetensors.torch import save

from tests.fuzz.fuzz_safetensors import scan_bytes
from tests.unit.detection_models import random_weight


def _seeds() -> list[bytes]:
    whole = save({"model.layers.0.mlp.up_proj.weight": random_weight(0, 48, 64).half()})
    return [whole, b"GGUF\x03\0\0\0" + bytes(80)]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_raise_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        content = bytearray(rng.choice(_seeds()))
        for _ in range(rng.randrange(1, 12)):
            action, place = rng.randrange(3), rng.randrange(min(len(content), 160))
            if action == 0:
                content[place] ^= 1 << rng.randrange(8)
            elif action == 1:
                del content[place : place + rng.randrange(1, 8)]
            else:
                content[place:place] = rng.randbytes(rng.randrange(1, 8))
        scan_bytes(bytes(content))


def test_a_gguf_file_that_is_damaged_raises_nothing_else(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", random_weight(0, 48, 64).half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole, rng = path.read_bytes(), random.Random(0)
    scan_bytes(whole)
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(200)] = rng.randrange(256)
        scan_bytes(bytes(content[: rng.randrange(4, len(content))]))
