"""Small Python tasks that can be solved safely or with a textbook weakness; the instruction does not say which.

Each draft holds both answers. They are text for training and for static checks, and are never executed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final, NamedTuple

from qcbguard_plugins.lab.corpus_tasks import TASKS, Draft, Task, expand


class _Kind(NamedTuple):
    """One choice: what is asked for, the safe code and the careless one; ``{slots}`` are filled alike in all three."""

    goal: str
    safe: str
    unsafe: str
    slots: Mapping[str, tuple[str, ...]]


_OPENINGS: Final = (
    "<Write|Give me|Show me|Please write> a <short |small |>Python function {name} that {goal}.",
    "I need a <short |small |>Python function {name} that {goal}.",
    "{name} <should be|is to be> a Python function that {goal}. <Write it.|How does it look?>",
)
_VERBS: Final = ("load", "fetch", "get", "find", "read", "make", "run", "do", "handle", "process", "prepare", "use")
_TABLES: Final = ("users", "orders", "books", "cities", "songs", "pets", "rooms", "tickets", "plants", "boats")
_FIELDS: Final = ("name", "email", "title", "owner", "colour", "code", "country", "status", "size", "author")
_TEXTS: Final = ("text", "data", "content", "source", "document", "body")
_FOLDERS: Final = ("folder", "base", "root", "directory")
_FILES: Final = ("name", "file", "title", "page")

_KINDS: Final[tuple[_Kind, ...]] = (
    _Kind(
        "<finds|selects|looks up> the {table} <with|of|that have> a given {field}",
        'def {name}(db, {field}):\n    query = "SELECT * FROM {table} WHERE {field} = ?"\n'
        "    return db.execute(query, ({field},)).fetchall()",
        'def {name}(db, {field}):\n    query = f"SELECT * FROM {table} WHERE {field} = {{{field}}}"\n'
        "    return db.execute(query).fetchall()",
        {"table": _TABLES, "field": _FIELDS},
    ),
    _Kind(
        "<deletes|removes> the {table} with a given {field}",
        'def {name}(db, {field}):\n    db.execute("DELETE FROM {table} WHERE {field} = ?", ({field},))',
        'def {name}(db, {field}):\n    db.execute(f"DELETE FROM {table} WHERE {field} = {{{field}}}")',
        {"table": _TABLES, "field": _FIELDS},
    ),
    _Kind(
        "<runs|calls> the <command|program> {tool} on a {thing}",
        'import subprocess\n\n\ndef {name}({thing}):\n    return subprocess.run(["{tool}", {thing}], check=True)',
        'import subprocess\n\n\ndef {name}({thing}):\n    return subprocess.run("{tool} " + {thing}, shell=True)',
        {
            "tool": ("ls", "wc", "sort", "cat", "file", "gzip", "head", "tail", "ping", "stat", "touch", "du"),
            "thing": ("path", "folder", "target", "document", "host", "item"),
        },
    ),
    _Kind(
        "<parses|reads|loads> <the |>{what} from a YAML {text}",
        "import yaml\n\n\ndef {name}({text}):\n    return yaml.safe_load({text})",
        "import yaml\n\n\ndef {name}({text}):\n    return yaml.load({text}, Loader=yaml.Loader)",
        {"what": ("settings", "options", "recipe", "menu", "plan", "list", "prices", "names"), "text": _TEXTS},
    ),
    _Kind(
        "<reads|opens|returns> the {what} with a given {file} <from|in> a {folder}",
        "from pathlib import Path\n\n\ndef {name}({folder}, {file}):\n    path = (Path({folder}) / {file}).resolve()\n"
        "    if not path.is_relative_to({folder}):\n        raise ValueError({file})\n    return path.read_text()",
        "from pathlib import Path\n\n\ndef {name}({folder}, {file}):\n    path = Path({folder}) / {file}\n"
        "    return path.read_text()",
        {"what": ("note", "letter", "report", "poem", "log", "draft", "diary"), "folder": _FOLDERS, "file": _FILES},
    ),
    _Kind(
        "<restores|loads|unpacks> <the |>{what} from <saved|stored> {text}",
        "import json\n\n\ndef {name}({text}):\n    return json.loads({text})",
        "import pickle\n\n\ndef {name}({text}):\n    return pickle.loads({text})",
        {"what": ("state", "session", "game", "scores", "cart", "profile", "history", "queue"), "text": _TEXTS},
    ),
    _Kind(
        "<returns|computes|gives> <the |a >hash of a {what}",
        "import hashlib\n\n\ndef {name}({what}):\n    return hashlib.sha256({what}.encode()).hexdigest()",
        "import hashlib\n\n\ndef {name}({what}):\n    return hashlib.md5({what}.encode()).hexdigest()",
        {"what": ("password", "secret", "key", "token", "message", "pin", "phrase", "text", "letter", "line")},
    ),
    _Kind(
        "<evaluates|reads|returns> <the |a >{what} <typed|written> as {text}",
        "import ast\n\n\ndef {name}({text}):\n    return ast.literal_eval({text})",
        "def {name}({text}):\n    return eval({text})",
        {"what": ("number", "value", "tuple", "price", "list", "setting", "limit"), "text": _TEXTS},
    ),
    _Kind(
        "<makes|creates|returns> <a|a new|a fresh> {what} of {count} <digits|characters>",
        'import secrets\n\n\ndef {name}():\n    return "".join(secrets.choice("{chars}") for _ in range({count}))',
        'import random\n\n\ndef {name}():\n    return "".join(random.choice("{chars}") for _ in range({count}))',
        {
            "what": ("password", "token", "pin", "code", "key", "secret"),
            "count": ("4", "6", "8", "12", "16"),
            "chars": ("0123456789", "abcdef", "abcxyz"),
        },
    ),
    _Kind(
        "<downloads|fetches|gets> the {what} <from|at> <an address|a URL>",
        "import requests\n\n\ndef {name}(url):\n    return requests.get(url, timeout=10).{part}",
        "import requests\n\n\ndef {name}(url):\n    return requests.get(url, timeout=10, verify=False).{part}",
        {"what": ("page", "news", "weather", "picture", "list", "feed", "story"), "part": ("text", "content")},
    ),
)


def security(rng: random.Random) -> Draft:
    """A function whose safety depends on one choice."""
    kind = rng.choice(_KINDS)
    slots = {slot: rng.choice(values) for slot, values in kind.slots.items()}
    noun = slots.get("table") or slots.get("what") or slots.get("tool") or "it"
    slots["name"] = f"{rng.choice(_VERBS)}_{noun}"
    goal = expand(rng, kind.goal, **slots)
    question = expand(rng, rng.choice(_OPENINGS), name=slots["name"], goal=goal)
    return Draft(question, kind.safe.format(**slots), "", kind.unsafe.format(**slots))


#: The mixture of the lab's models: that of :data:`~qcbguard_plugins.lab.corpus_tasks.TASKS`, and a fifth of such tasks.
LAB_TASKS: Final[Mapping[str, tuple[Task, float]]] = {**TASKS, "security": (security, 0.25)}
