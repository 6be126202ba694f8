"""Models by their name on the hub, from a server that speaks the hub's protocol, with the real client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qcbguard_plugins.checkpoint.hub import display_name, local_model
from tests.helpers.local_hub import TOKEN, LocalHub, serve

CODE = """
import sys
from qcbguard_plugins.checkpoint.hub import display_name, local_model
from qcbguard_plugins.errors import QcbguardError
for name in sys.argv[1:]:
    try:
        folder = local_model(name)
        print(folder, display_name(folder), sep="|")
    except QcbguardError as error:
        print(error.exit_code, type(error).__name__, *str(error).splitlines(), sep="|")
"""


@pytest.fixture
def hub(llama: Path, tmp_path: Path) -> Iterator[LocalHub]:
    """A model with two revisions and a pickle beside it; a private and a gated one."""
    first, second = (Path(shutil.copytree(llama, tmp_path / "hub" / name)) for name in ("first", "second"))
    tensors = load_file(second / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, second / "model.safetensors", {"format": "pt"})
    (first / "pytorch_model.bin").write_bytes(b"never downloaded")
    repositories = {
        "org/model": {"main": second, "v1": first},
        "org/private": {"main": first},
        "org/gated": {"main": first},
    }
    with serve(LocalHub(repositories, frozenset({"org/private"}), frozenset({"org/gated"}))) as served:
        yield served


def run(hub: LocalHub, tmp_path: Path, *names: str, **environment: str) -> list[list[str]]:
    """What a process of its own makes of names: the client reads its environment once."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *names],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, **own, **environment},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.splitlines()]


def test_a_name_a_revision_and_the_cache(hub: LocalHub, tmp_path: Path, llama: Path) -> None:
    (folder, name), (newest, _) = run(hub, tmp_path, "org/model@v1", "org/model")
    assert (Path(folder) / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert not (Path(folder) / "pytorch_model.bin").exists()
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    assert name == f"org/model@{Path(folder).name[:12]}" == display_name(Path(folder)) and newest != folder
    hub.asked.clear()
    start = time.monotonic()
    offline, missing = run(hub, tmp_path, "org/model@v1", "org/other", HF_HUB_OFFLINE="1")
    assert offline[0] == folder and hub.asked == []
    assert missing[:2] == ["2", "CheckpointError"] and "org/other is not a path here, is not in the hub's" in missing[2]
    unreachable, missing = run(hub, tmp_path, "org/model@v1", "org/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable[0] == folder and "http://127.0.0.1:9 cannot be reached" in missing[2]
    assert time.monotonic() - start < 120, "nothing tries for minutes where there is no network"


def test_what_cannot_be_had_is_explained(hub: LocalHub, tmp_path: Path) -> None:
    missing, revision, private, gated = run(hub, tmp_path, "org/missing", "org/model@v9", "org/private", "org/gated")
    assert missing[:2] == private[:2] == revision[:2] == ["4", "UsageError"] and gated[:2] == ["2", "CheckpointError"]
    assert missing[2] == f"org/missing is neither a path here nor a model of {hub.url}"
    assert private[2].startswith("org/private is neither") and "HF_TOKEN" in private[3]
    assert revision[2] == f"{hub.url} has no such revision: org/model@v9" and "after the @" in revision[3]
    assert gated[2] == f"{hub.url} does not let you read org/gated" and "Ask for access" in gated[3]


def test_a_token_and_a_path_that_wins_over_a_name(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    private, gated, path = run(hub, tmp_path, "org/private", "org/gated", "org/model", HF_TOKEN=TOKEN)
    assert Path(private[0]).is_dir() and Path(gated[0]).is_dir()
    assert path == ["org/model", "model"] and not any("org/model" in asked for asked in hub.asked)


@pytest.mark.parametrize("path", ["model", "./org/model", "/org/model", "a/b/c", "../org/model", "~/model", "org/"])
def test_what_is_no_name_is_a_path(path: str) -> None:
    assert local_model(path) == Path(path)
