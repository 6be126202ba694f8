"""The digest that claims name is the one that model signing signs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qcbguard_plugins.checkpoint.subject import CLAIMS_FILE, SIGNATURE_FILE, Observed, subject_of
from qcbguard_plugins.errors import CheckpointError, UsageError
from tests.helpers.signing import make_keys

# "a-b" sorts before "a/" as text and behind it as a path; git's own files are ignored at the top alone.
NAMES = ("a/b/x", "a/x.y", "a.txt", "a-b/z", "z", "Z", ".hidden", ".git/k", ".gitignore", "a/.gitignore", "é ü.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    for name in NAMES:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name, encoding="utf-8")
    return model


def test_a_folder_has_the_root_digest_that_is_signed(folder: Path, tmp_path: Path) -> None:
    signed = make_keys(tmp_path).sign(folder, tmp_path / "model.sig")
    found = subject_of(folder)
    assert found.sha256 == signed
    assert found.name == "model"
    assert sorted(found.files) == sorted(set(NAMES) - {".git/k", ".gitignore"})


def test_claims_and_signature_in_the_folder_change_nothing(folder: Path, tmp_path: Path) -> None:
    before = subject_of(folder)
    (folder / CLAIMS_FILE).write_text("{}\n", encoding="utf-8")
    signed = make_keys(tmp_path).sign(folder, folder / SIGNATURE_FILE, ignore=[folder / CLAIMS_FILE])
    assert subject_of(folder).sha256 == signed == before.sha256
    (folder / "a" / CLAIMS_FILE).write_text("{}\n", encoding="utf-8")
    assert subject_of(folder).sha256 != before.sha256


def test_links_to_files_count_as_their_content(folder: Path, tmp_path: Path) -> None:
    before = subject_of(folder).sha256
    (folder / "z").rename(tmp_path / "blob")
    (folder / "z").symlink_to(tmp_path / "blob")
    assert subject_of(folder).sha256 == before
    assert make_keys(tmp_path).sign(folder, tmp_path / "model.sig", links=True) == before


def test_a_file_has_its_sha256(folder: Path) -> None:
    found = subject_of(folder / "a.txt")
    assert (found.name, found.sha256) == ("a.txt", hashlib.sha256(b"a.txt").hexdigest())


@pytest.mark.parametrize("make", ["linked folder", "pipe", "broken link", "no file", "nothing"])
def test_what_a_digest_cannot_cover_is_refused(folder: Path, tmp_path: Path, make: str) -> None:
    path, error = folder, CheckpointError
    if make == "linked folder":
        (folder / "linked").symlink_to(tmp_path)
    elif make == "pipe":
        os.mkfifo(folder / "pipe")
    elif make == "broken link":
        (folder / "gone").symlink_to(tmp_path / "gone")
    elif make == "no file":
        path = tmp_path / "empty"
        path.mkdir()
    else:
        path, error = tmp_path / "missing", UsageError
    with pytest.raises(error):
        subject_of(path)


@pytest.mark.parametrize("change", ["other", "added", "removed"])
def test_a_model_that_changes_meanwhile_is_not_named(folder: Path, change: str) -> None:
    observed = Observed(folder)
    if change == "other":
        (folder / "z").write_text("other", encoding="utf-8")
    elif change == "added":
        (folder / "new").write_text("", encoding="utf-8")
    else:
        (folder / "z").unlink()
    with pytest.raises(CheckpointError, match="changed while it was read"):
        observed.subject()
