"""Models by their name on the Hugging Face hub, as ``from_pretrained`` takes them: what is here already stays local."""

from __future__ import annotations

import re
from pathlib import Path

from qcbguard_plugins.checkpoint.loaded_files import WEIGHT_SUFFIXES
from qcbguard_plugins.errors import CheckpointError, MissingDependencyError, QcbguardError, UsageError

_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)
_SNAPSHOT = re.compile(r"models--(?P<organization>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)$")
_SHORT_REVISION = 12


def local_model(model: Path | str) -> Path:
    """The folder or file of a model, downloaded into the hub's cache first where it is the name of one on the hub.

    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and the token of ``hf auth login`` are heeded.
    Pickles and other forms of the weights are not downloaded.

    Args:
        model: A path, which wins where both exist; or ``organization/name``, or ``organization/name@revision``.

    Raises:
        UsageError: There is neither such a path nor such a model or revision on the hub.
        CheckpointError: The hub cannot be reached and the model is not in the cache, or access is denied.
        MissingDependencyError: It is a name, and huggingface_hub is not installed.
    """
    named = _HUB_NAME.fullmatch(str(model))
    if named is None or Path(model).exists():
        return Path(model)
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            f"{model} is not a path, and a name on the hub needs huggingface_hub",
            remedy="Check the path, or pip install 'qcbguard-plugins[hf]'.",
        ) from error
    others = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES - {".safetensors"})]
    try:
        folder = huggingface_hub.snapshot_download(
            named["name"], revision=named["revision"], ignore_patterns=others, library_name="qcbguard-plugins"
        )
    except Exception as error:  # the hub's errors have no common base: HTTP, file system, timeouts
        raise _explained(str(model), error) from error
    return Path(folder)


def display_name(path: Path) -> str:
    """How reports call a model: its name on the hub with the revision, or that of its folder or file."""
    resolved = path.resolve()
    snapshot = _SNAPSHOT.search(resolved.as_posix())
    if snapshot is None:
        return resolved.name
    return f"{snapshot['organization']}/{snapshot['name']}@{snapshot['revision'][:_SHORT_REVISION]}"


def _explained(model: str, error: Exception) -> QcbguardError:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{hub} does not let you read {model}",
            remedy="Ask for access on the model's page, then log in with 'hf auth login' or set HF_TOKEN.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"{hub} has no such revision: {model}", remedy="Name a branch, a tag or a commit after the @."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"{model} is neither a path here nor a model of {hub}",
            remedy="Check the spelling. A private model needs 'hf auth login' or HF_TOKEN.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(
            f"{model} is not a path here, is not in the hub's cache ({constants.HF_HUB_CACHE}), and {hub} cannot be "
            "reached",
            remedy="Check the path, or go online once; HF_HUB_OFFLINE=1 keeps to the cache.",
        )
    first_line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return CheckpointError(
        f"{model} cannot be downloaded from {hub}: {first_line}",
        remedy="Try again, or download it with 'hf download' and give the folder.",
    )
