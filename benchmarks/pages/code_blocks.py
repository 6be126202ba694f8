"""The code blocks of the README and of the documentation, run as a reader would.

    python -m benchmarks.pages.code_blocks README.md            # what the commands of a page print now
    python -m benchmarks.pages.code_blocks --list               # every block, and what becomes of it

Each page has a folder of its own in which its blocks run in order. The folder holds ``model`` (the attacked example
model), ``examples`` and ``prompts.txt``. A comment just before a block says what is different about it:

    <!-- slow -->              run with the slow tests only
    <!-- not run: reason -->   checked as text only: options, imports, syntax, names of extras
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("console", "python", "yaml", "toml", "json", "text", "mermaid", "bibtex")
# Pages whose blocks are checked as text only.
TEXT_ONLY = {
    "docs/architecture.md": "shows pieces of the source",
    "docs/benchmark-models.md": "its commands measure for hours",
    "docs/benchmark.md": "its commands measure for hours",
    "docs/detection.md": "its commands measure for hours",
    "docs/evidence.md": "its commands need files that others sign",
    "docs/purify.md": "its commands train for minutes to hours; tests/integration/test_purify.py runs a small one",
    "docs/robustness.md": "its commands run for hours",
    "examples/evidence/README.md": "a model card, read beside the weights that it describes",
}
_FENCE = re.compile(r"^( *)(```+|~~~+)(.*)$")
_MARK = re.compile(r"<!-- (slow|not run: \S.*) -->$")
_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Its page, relative to the repository.
        line: Line of the opening fence.
        language: The word after the fence.
        text: What is inside, without the fence's indentation.
        reason: Why it is not run; empty for one that is.
        slow: Whether only the slow tests run it.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str
    slow: bool

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line after ``$``, with the lines that continue it, and the output that the page shows."""

    line: str
    shown: tuple[str, ...]


def pages() -> list[str]:
    """Every page with code for readers, relative to the repository. A model card is about the folder around it."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    for folder in ("docs", "integrations", "examples"):
        found += sorted((ROOT / folder).rglob("*.md"))
    pages = [path.relative_to(ROOT).as_posix() for path in found if path.is_file()]
    return [page for page in pages if page != "examples/evidence/README.md"]


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found, position = [], 0
    while position < len(lines):
        fence = _FENCE.match(lines[position])
        if fence is None:
            position += 1
            continue
        indent, opening = len(fence[1]), position
        position += 1
        while position < len(lines) and lines[position].strip() != fence[2]:
            position += 1
        inside = [line[indent:] for line in lines[opening + 1 : position]]
        before = next((line.strip() for line in reversed(lines[:opening]) if line.strip()), "")
        mark = _MARK.search(before)
        reason = mark[1].removeprefix("not run: ") if mark and mark[1] != "slow" else TEXT_ONLY.get(page, "")
        language = fence[3].strip().split(" ")[0]
        found.append(Block(page, opening + 1, language, "\n".join(inside), reason, bool(mark and mark[1] == "slow")))
        position += 1
    return found


def commands_of(block: Block) -> list[Command]:
    """The commands of a console block; a backslash or an open quote continues a line."""
    found: list[Command] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            found.append(Command(_without_comment(command), ()))
        elif found and line.strip():
            found[-1] = Command(found[-1].line, (*found[-1].shown, line))
        elif line.strip():
            raise ValueError(f"{block.place}: a console block begins with '$ '")
    return found


def _without_comment(command: str) -> str:
    return re.sub(r"\s{2,}# .*$", "", command)


def check_text(block: Block) -> None:
    """What can be known without running: the language, syntax, options, imports and extras.

    Raises:
        ValueError, SyntaxError: Something is wrong; the message says where.
    """
    if block.language not in LANGUAGES:
        raise ValueError(f"{block.place}: a block names its language, one of {', '.join(LANGUAGES)}")
    if block.language == "python":
        _check_imports(block)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        import yaml

        yaml.safe_load(block.text)
    elif block.language == "console":
        for command in commands_of(block):
            check_command(command.line, block.place)


def _check_imports(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, block.place)):
        module = str(getattr(node, "module", "") or "")
        if isinstance(node, ast.ImportFrom) and module.partition(".")[0] == "qcbguard_plugins":
            known = _names_of(module)
            for alias in node.names:
                if alias.name not in known:
                    raise ValueError(f"{block.place}: {module} has no {alias.name}")


def _names_of(module: str) -> set[str]:
    """Names at the top of a module, read from its source: some modules need packages that are not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return set()
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def check_command(line: str, place: str) -> None:
    """Options of ``qcbguard`` and names of extras; other commands pass.

    Raises:
        ValueError: An option, an argument or an extra does not exist, or one is missing.
    """
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"qcbguard-plugins\[([\w,]+)\]", line):
        unknown = set(named.split(",")) - set(extras)
        if unknown:
            raise ValueError(f"{place}: no such extra: {', '.join(sorted(unknown))}")
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    for operator, group in itertools.groupby(lexer, key=lambda word: set(word) <= set("|&;")):
        words = [] if operator else list(group)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["qcbguard"]:
            _parse(words[1:], place)


def _parse(words: list[str], place: str) -> None:
    import click

    from qcbguard_plugins.cli import app

    command: click.Command = app
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, words = words[0], words[1:]
        if name not in command.commands:
            raise ValueError(f"{place}: qcbguard has no command {name}")
        command = command.commands[name]
    if {"-h", "--help", "--version"} & set(words) or isinstance(command, click.Group):
        return
    present = mock.patch.object(click.Path, "convert", lambda self, value, param, context: Path(value))
    try:
        with present:
            command.make_context("qcbguard", list(words)).close()
    except click.ClickException as error:
        raise ValueError(f"{place}: qcbguard {command.name}: {error.format_message()}") from error


class Session:
    """One page's folder, in which its blocks run one after the other."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(ROOT / "examples" / "models" / "attacked", folder / "model")
        (folder / "examples").symlink_to(ROOT / "examples")
        pairs = (ROOT / "examples" / "models" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["instruction"].replace("\n", " ") for line in pairs[:24]]
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        self.folder = folder
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> list[tuple[Command, str, int]]:
        """Run a block; for a console block, each command with what it printed and its exit code."""
        with contextlib.chdir(self.folder), mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            if block.language == "python":
                code = compile(block.text, block.place, "exec")
                exec(code, self._names)
                return []
            if block.language != "console":
                return []
            return [(command, *self._run_command(command.line)) for command in commands_of(block)]

    def _run_command(self, line: str) -> tuple[str, int]:
        words = shlex.split(line, comments=True)
        if words[0] == "qcbguard" and not any(sign in line for sign in ("|", ">", "$", "&")):
            return self._run_qcbguard(words[1:])
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        bash = shutil.which("bash") or "bash"
        done = subprocess.run([bash, "-c", line], capture_output=True, text=True, env=environment, check=False)
        return done.stdout if done.returncode in (0, 1) else done.stdout + done.stderr, done.returncode

    @staticmethod
    def _run_qcbguard(words: list[str]) -> tuple[str, int]:
        """In this process: each start of Python would import torch again."""
        from qcbguard_plugins.cli import main

        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(words)
        return output.getvalue() if code in (0, 1) else output.getvalue() + errors.getvalue(), code


def missing_lines(shown: tuple[str, ...], printed: str) -> list[str]:
    """Lines that a page shows and the command does not print, in their order; numbers and spaces may differ.

    A line of three dots stands for any number of lines.
    """
    rest = iter([_bare(line) for line in printed.splitlines()])
    missing = []
    for line in shown:
        if line.strip() == "...":
            continue
        rest, kept = itertools.tee(rest)
        if _bare(line) not in kept_until(rest, _bare(line)):
            missing.append(line)
            rest = kept
    return missing


def kept_until(lines: Iterator[str], wanted: str) -> list[str]:
    """Lines up to the wanted one, or all."""
    seen = []
    for line in lines:
        seen.append(line)
        if line == wanted:
            break
    return seen


def _bare(line: str) -> str:
    return " ".join(re.sub(r"[─━]+", "-", _NUMBER.sub("#", line)).split())


def main() -> int:
    """Print what the commands of a page print, or list every block."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--list", action="store_true", help="list every block and what becomes of it")
    arguments = parser.parse_args()
    for page in arguments.pages or pages():
        if arguments.list:
            for block in blocks_of(page):
                fate = f"not run: {block.reason}" if block.reason else "slow" if block.slow else "runs"
                print(f"{block.place}\t{block.language}\t{fate}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            session = Session(Path(folder))
            for block in blocks_of(page):
                for command, printed, code in [] if block.reason else session.run(block):
                    print(f"$ {command.line}\n{printed}[exit {code}]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
