"""The long description for the package index: the README, with links that work outside of the repository."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCE = PROJECT["urls"]["Source"].rstrip("/")
_TARGET = re.compile(r"""(\]\(|src="|srcset=")(?!https?:|\#)([^)"\s]+)""")


def long_description() -> str:
    """README.md with absolute links, to the tag of this version."""
    tag = f"v{PROJECT['version']}"

    def absolute(match: re.Match[str]) -> str:
        target = match[2]
        if target.startswith("../../"):
            return f"{match[1]}{SOURCE}/{target.removeprefix('../../')}"
        base = (
            SOURCE.replace("github.com", "raw.githubusercontent.com") if target.endswith(".svg") else f"{SOURCE}/blob"
        )
        return f"{match[1]}{base}/{tag}/{target}"

    return _TARGET.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
