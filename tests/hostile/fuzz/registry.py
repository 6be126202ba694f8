"""What is fuzzed: every format of a file that the package reads, each by the code that a user's command would run.

A target makes real files, and says which of them is handed to the fuzzer. Reading it may raise the package's own errors
and nothing else; whatever else comes out is a defect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcbguard_plugins.errors import QcbguardError
from tests.hostile.fuzz import mutation
from tests.hostile.fuzz.mutation import Mutate

MAX_BYTES = 1 << 16

#: Reads one file.
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Prepared:
    """A target with its files.

    Attributes:
        path: The file that the fuzzer writes.
        seeds: Contents that are read without an error.
        read: Reads it.
        reset: Puts the other files back in place, where reading may have removed them.
    """

    path: Path
    seeds: list[bytes]
    read: Read
    reset: Callable[[], object] = bool

    def run(self, content: bytes) -> QcbguardError | None:
        """Read some content; return the package's own error where it raised one. Every other error comes through."""
        self.reset()
        self.path.write_bytes(content[:MAX_BYTES])
        try:
            self.read(self.path)
        except QcbguardError as error:
            return error
        return None


@dataclass(frozen=True)
class Target:
    """A format of a file.

    Attributes:
        name: Its name on the command line.
        summary: What is read.
        prepare: Makes the files in a folder.
        mutate: How an input is changed besides the fuzzer's own ways.
    """

    name: str
    summary: str
    prepare: Callable[[Path], Prepared]
    mutate: Mutate


#: Makes the files of a target in a folder.
Prepare = Callable[[Path], Prepared]

TARGETS: dict[str, Target] = {}


def target(name: str, summary: str, mutate: Mutate = mutation.damaged) -> Callable[[Prepare], Prepare]:
    """Make a target known by name."""

    def register(prepare: Prepare) -> Prepare:
        TARGETS[name] = Target(name, summary, prepare, mutate)
        return prepare

    return register
