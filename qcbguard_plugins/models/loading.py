"""Load a model in full precision, and its tokenizer, without running code of theirs."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcbguard_plugins.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel
from qcbguard_plugins.models.skeleton import load_config, model_class, require_transformers


def load_full_precision(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    cls = model_class(load_config(model_dir))
    try:
        model: PreTrainedModel = cls.from_pretrained(
            model_dir, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # as above: an index without the entries that transformers wants, and the like
        raise CheckpointError(f"transformers cannot load {model_dir.name}: {type(error).__name__}: {error}") from error
    return model.eval()


def load_tokenizer(model_dir: Path | str, *, local: bool = True) -> Any:
    """The model's tokenizer, or ``None`` where it has none that can be loaded without running code of its own."""
    transformers = require_transformers()
    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(
                model_dir, trust_remote_code=False, local_files_only=local
            )
    except Exception:  # absent, malformed, or in need of a library or code: in each case there is none to use
        return _bare_tokenizer(Path(model_dir))


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
