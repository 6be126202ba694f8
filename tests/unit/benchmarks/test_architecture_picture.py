"""The picture of the rooms is drawn from the code as it is."""

from __future__ import annotations

import html

from benchmarks.pages.architecture import PICTURE, floors, summary
from qcbguard_plugins.errors import QcbguardError
from tests.conftest import ROOT


def test_every_room_is_a_floor() -> None:
    package = ROOT / "qcbguard_plugins"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert rooms | {"errors"} == set(floors())
    assert sorted(path.name for path in package.glob("*.py")) == ["__init__.py", "errors.py"]


def test_the_picture_has_every_room_in_its_words() -> None:
    svg = html.unescape(PICTURE.read_text(encoding="utf-8"))
    for room in floors():
        assert f">{room}<" in svg
        assert all(word in svg for word in summary(room).split()), room


def test_every_error_has_an_exit_code() -> None:
    assert all(error.exit_code in (1, 2, 3, 4) for error in QcbguardError.__subclasses__())
