"""Every code block of README and documentation: read as text in all pages, and run where nothing stands in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pages import code_blocks
from benchmarks.pages.code_blocks import Block, Session, blocks_of, check_command, check_text, missing_lines, pages

PAGES = [page for page in pages() if blocks_of(page)]
# A page is run as a whole, because its blocks follow from each other.
RUN = [page for page in PAGES if any(not block.reason for block in blocks_of(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_can_be_right(page: str) -> None:
    for block in blocks_of(page):
        check_text(block)


@pytest.mark.parametrize(
    "page", [page for page in RUN if any(_.slow is False and not _.reason for _ in blocks_of(page))]
)
def test_quick_blocks_run(page: str, tmp_path: Path) -> None:
    _run(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if any(block.slow for block in blocks_of(page))])
def test_all_blocks_run(page: str, tmp_path: Path) -> None:
    _run(page, tmp_path, slow=True)


def _run(page: str, folder: Path, *, slow: bool) -> None:
    session = Session(folder)
    for block in blocks_of(page):
        if block.reason or (block.slow and not slow):
            continue
        for command, printed, code in session.run(block):
            # A scan and a diff of the attacked model find something.
            found = code == 1 and command.line.startswith(("qcbguard scan", "qcbguard diff"))
            assert code == 0 or found, f"{block.place}: {command.line}\nexit {code}\n{printed}"
            missing = missing_lines(command.shown, printed)
            assert not missing, f"{block.place}: {command.line}\nnot printed: {missing}\nprinted:\n{printed}"


def _block(text: str, language: str = "console") -> Block:
    return Block("page.md", 1, language, text, "", slow=False)


@pytest.mark.parametrize(
    "text",
    [
        "$ qcbguard convert-hf-to-gguf convert_hf_to_gguf.py MODEL",  # --for is missing
        "$ qcbguard scan MODEL --formats nf4",
        "$ qcbguard protect MODEL",
        '$ pip install "qcbguard-plugins[everything]"',
        "qcbguard list",
    ],
)
def test_a_wrong_command_is_seen(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md:1"):
        check_text(_block(text))


def test_a_wrong_import_is_seen() -> None:
    with pytest.raises(ValueError, match="has no GuardConfig"):
        check_text(_block("from qcbguard_plugins import GuardConfig", "python"))


def test_variables_and_pipes_hide_no_command() -> None:
    check_command("A=1 qcbguard list --json | head -3 && qcbguard doctor", "here")
    with pytest.raises(ValueError, match="no command"):
        check_command("cat x | qcbguard lst", "here")


def test_a_shown_line_that_is_not_printed_is_named() -> None:
    printed = "28 of 28 tensors; 1.8 s\nnf4  attacked  +50.6%\n"
    assert missing_lines(("28 of 28 tensors; 0.3 s", "...", "nf4 attacked +49.9%"), printed) == []
    assert missing_lines(("28 of 28 tensors; 0.3 s", "nf4 clean +49.9%"), printed) == ["nf4 clean +49.9%"]
    assert missing_lines(("nf4 attacked +1%", "28 of 28 tensors; 1 s"), printed) == ["28 of 28 tensors; 1 s"]


def test_a_continued_line_is_one_command() -> None:
    (command,) = code_blocks.commands_of(_block("$ qcbguard scan MODEL \\\n      --for nf4   # words\nresult"))
    assert (command.line, command.shown) == ("qcbguard scan MODEL --for nf4", ("result",))
