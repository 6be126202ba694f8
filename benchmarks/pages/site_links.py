"""Hooks of MkDocs.

Links that leave ``docs/`` lead to the repository: pages are read on the site and in the repository, and
``../README.md`` works only there. What plugins leave behind of other notations is cleaned up.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)((?:#[^)\s]*)?\))")
# A place in a file, as error messages print it; after another bracket it would be a reference.
_PLACE = re.compile(r"(?<=\] )\[([\w.]+:\d+)\]")
# mkdocs-click 0.9 prints click's mark for "no default"; docstrings name classes by a role of Sphinx.
_NO_DEFAULT = "<code>Sentinel.UNSET</code>"
_ROLE = re.compile(r":(?:class|func|meth|mod):<code>~?(?:\w+\.)*(\w+)</code>")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace relative links to files outside of the documentation folder."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def absolute(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if target.startswith("docs/"):
            return match[0]
        return f"{match[1]}{config['repo_url'].rstrip('/')}/blob/main/{target}{match[3]}"

    return _LINK.sub(absolute, _PLACE.sub(r"\\[\1\\]", markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Drop marks that mean nothing to a reader."""
    return _ROLE.sub(r"<code>\1</code>", html.replace(_NO_DEFAULT, ""))
