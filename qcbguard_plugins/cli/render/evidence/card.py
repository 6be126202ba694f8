"""The section of a model card that says what was guarded, verified and measured, and its front matter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qcbguard_plugins.cli.render.advice import printable
from qcbguard_plugins.cli.render.evidence.facts import Evidence, guard_sentences, measured_sentences
from qcbguard_plugins.cli.render.evidence.front_matter import merge_card
from qcbguard_plugins.errors import UsageError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_VERBS = {"verify": "Verified", "scan": "Scanned", "diff": "Compared"}
_MISSING = {
    "verify": "whether the stock quantizer stores the planned codes",
    "scan": "what a scan of these weights finds",
    "diff": "whether the quantized model behaves as the full-precision model",
}


def to_card(evidence: Evidence, original: bytes = b"", base_model: str = "") -> bytes:
    """A model card with the evidence in it.

    Args:
        evidence: The folder and reports about it.
        original: The card so far; all of it stays.
        base_model: The base's name on the Hugging Face hub, in the hub's own letter case, else it links nowhere.

    Raises:
        UsageError: ``base_model`` is no name of the hub.
        CheckpointError: The card cannot be added to; see :func:`merge_card`.
    """
    if base_model and not _HUB_NAME.fullmatch(base_model):
        raise UsageError(f"{base_model!r} is no name of a model on the hub", remedy="For example: Qwen/Qwen2.5-0.5B")
    fields = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    tags = ["qcbguard", *(f"guarded-{_tag(name)}" for name in evidence.guard.formats)]
    return merge_card(original, fields, tags, section(evidence))


def section(evidence: Evidence) -> str:
    """The section, as Markdown."""
    guard = evidence.guard
    formats = ", ".join(guard.formats)
    lines = [
        f"## Guarded for {_escape(formats)}",
        "",
        f"The weights of this folder are those of `{_code(guard.source)}`, rounded in advance against backdoors that a "
        "stock quantizer's rounding would bring out (quantization-conditioned backdoors). `qcbguard.json` says what "
        "was done, tensor by tensor.",
        "",
        _item("Guarded", guard_sentences(guard)),
    ]
    lines += [_item(f"{_VERBS[r.kind]}, {r.created}", measured_sentences(r)) for r in evidence.reports]
    missing = [text for kind, text in _MISSING.items() if kind not in {report.kind for report in evidence.reports}]
    if missing:
        lines.append(_item("Not stated here", [f"{'; '.join(missing)}."]))
    lines += [
        "",
        "A model that misbehaves at every precision is outside of what this can see or change. To check it yourself:",
        "",
        "```console",
        "$ qcbguard verify .",
        "```",
    ]
    return "\n".join(lines)


def _item(name: str, sentences: Sequence[str]) -> str:
    return f"- **{name}**: {_escape(' '.join(sentences))}"


def _tag(format: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", format.lower()).strip("-")


def _code(text: str) -> str:
    return printable(text).replace("`", "'")


def _escape(text: str) -> str:
    """Text from a report, so that it is no Markdown, no HTML and no marker of a section."""
    text = printable(text, limit=len(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + character if character in "\\`*_[]|#" else character for character in text)
