"""Load a model in full precision, and its tokenizer, without running code of theirs."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcbguard_plugins.checkpoint.loaded_files import loaded_files
from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.models.skeleton import load_config, model_class, require_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

_SAMPLE = "A bridge crosses the river; seven boats pass below it."
# Any vocabulary, of single letters even, tells more ids in the sample apart.
_SAMPLE_IDS = 6


def load_full_precision(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights.

    Raises:
        CheckpointError: The folder does not say clearly which weights will be loaded, or transformers cannot load it.
    """
    loaded_files(model_dir)
    cls = model_class(load_config(model_dir))
    try:
        model: PreTrainedModel = cls.from_pretrained(
            model_dir, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # as above: an index without the entries that transformers wants, and the like
        raise CheckpointError(f"transformers cannot load {model_dir.name}: {type(error).__name__}: {error}") from error
    return model.eval()


def load_tokenizer(model_dir: Path | str) -> Any:
    """The tokenizer in a folder, or ``None`` where it holds none that can be used without running code of its own.

    Nothing is fetched: what a load has left on this machine is all that counts.
    """
    transformers = require_transformers()
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                model_dir, trust_remote_code=False, local_files_only=True
            )
    except Exception:  # absent, malformed, or in need of a library or code: in each case there is none to use
        tokenizer = _bare_tokenizer(Path(model_dir))
    return tokenizer if tokenizer is not None and _reads_text(tokenizer) else None


def tokenizer_beside(files: Sequence[Path]) -> Any:
    """The tokenizer beside weight files: in their folder, or in the one above where they lie in a subfolder of it."""
    folder = files[0].parent
    return load_tokenizer(folder) or (load_tokenizer(folder.parent) if _is_subfolder(folder) else None)


def _is_subfolder(folder: Path) -> bool:
    """True for a folder inside a model's folder or inside a snapshot of the hub's cache."""
    return (folder.parent / "config.json").is_file() or folder.parent.parent.name == "snapshots"


def _reads_text(tokenizer: Any) -> bool:
    """False for one without a vocabulary, such as transformers makes of a model type where files are missing."""
    try:
        with _quiet():
            return len(set(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])) >= _SAMPLE_IDS
    except Exception:  # one that wants more than text, as those of documents do
        return False


def require_tokenizer(model_dir: Path, remedy: str = "Put the tokenizer files beside the model.") -> Any:
    """The model's tokenizer.

    Args:
        model_dir: The model.
        remedy: What the error tells the user to do.

    Raises:
        CheckpointError: There is none that can be loaded without running code of its own.
    """
    tokenizer = load_tokenizer(model_dir)
    if tokenizer is None:
        raise CheckpointError(
            f"{model_dir.name} has no tokenizer that can be loaded without code of its own", remedy=remedy
        )
    return tokenizer


def _bare_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a folder that transformers 5 saved, for version 4, which does not know the class it names."""
    transformers = require_transformers()
    if not transformers.__version__.startswith("4.") or not (model_dir / "tokenizer.json").is_file():
        return None
    try:
        with _quiet():
            return transformers.PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    except Exception:  # as above
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
