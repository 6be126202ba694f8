"""A model card that is added to keeps every byte it had."""

from __future__ import annotations

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qcbguard_plugins.cli.render.evidence.front_matter import merge_card
from qcbguard_plugins.errors import CheckpointError

FIELDS = {"base_model": "Org/Base-1.5B", "base_model_relation": "quantized"}
TAGS = ["qcbguard", "guarded-nf4"]
SECTION = "## Guarded\n\n- **Verified**: yes\n"
_BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")

VALUES = st.one_of(
    st.text(max_size=20), st.integers(), st.booleans(), st.none(), st.dates(), st.lists(st.text(max_size=8), max_size=3)
)
MAPPINGS = st.dictionaries(st.text(min_size=1, max_size=12), VALUES, max_size=5)


@st.composite
def cards(draw: st.DrawFn) -> bytes:
    data = draw(MAPPINGS)
    if draw(st.booleans()):
        data["tags"] = draw(st.one_of(st.none(), st.lists(st.text(max_size=8), max_size=3)))
    front = yaml.safe_dump(
        data, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.sampled_from([False, None])),
        sort_keys=draw(st.booleans()), indent=draw(st.sampled_from([2, 4])),
    )  # fmt: skip
    comment = draw(st.sampled_from(["", "# a comment\n"]))
    text = f"---\n{comment}{front}---\n" if data else ""
    text = text.replace("\n", draw(st.sampled_from(["\n", "\r\n"])))
    return text.encode() + draw(st.binary(max_size=60))


def is_kept(original: bytes, merged: bytes) -> bool:
    """Whether the bytes of one are found in the other in the same order."""
    rest = iter(merged)
    return all(byte in rest for byte in original)


def front_matter(card: bytes) -> dict[str, object]:
    found = _BLOCK.search(card.decode("utf-8", "replace"))
    return yaml.safe_load(found[2]) or {} if found else {}


@settings(max_examples=300, deadline=None)
@given(original=cards())
@example(original=b"")
@example(original=b"# Title")
@example(original=b"---\nlicense: mit\n---\n# Title\n")
@example(original=b"---\r\ntags:\r\n  - a # why\r\n  - b\r\nlicense: mit\r\n---\r\ntext")
@example(original=b"---\ntags: [a, b]\n---\n")
@example(original=b"---\ntags: []\n---\n")
@example(original=b"---\ntags:\nlicense: mit\n---\n")
@example(original=b"---\ntags: # none yet\nlicense: mit\n---\n")
@example(original=b"---\nnote: |+\n  kept\n\n\n---\n")
@example(original=b"---\n  license: mit\n  tags:\n  - a\n---\n")
@example(original=b"---\nbase_model:\n- Org/Base-1.5B\n- Org/Other\n---\n")
@example(original=b"no front matter \xff\xfe\r\n---\n")
def test_every_byte_is_kept(original: bytes) -> None:
    try:
        merged = merge_card(original, FIELDS, TAGS, SECTION)
    except CheckpointError:
        # Refused, which loses nothing either; only for what cannot be added to.
        assume(False)
        return
    assert is_kept(original, merged)
    before, after = front_matter(original), front_matter(merged)
    assert after["base_model"] in ("Org/Base-1.5B", ["Org/Base-1.5B", "Org/Other"])
    assert after["base_model_relation"] == "quantized"
    assert set(TAGS) <= set(after["tags"])
    assert [tag for tag in after["tags"] if tag not in TAGS] == [t for t in before.get("tags") or [] if t not in TAGS]
    for name, value in before.items():
        assert name in ("tags", "base_model") or after[name] == value
    assert merge_card(merged, FIELDS, TAGS, SECTION) == merged
    again = merge_card(merged, FIELDS, TAGS, "## Guarded\n\nsomething else")
    assert b"something else" in again and b"**Verified**" not in again
    assert is_kept(original, again)


@pytest.mark.parametrize(
    ("original", "says"),
    [
        (b"---\nbase_model: Org/Parent\n---\n", "says base_model: 'Org/Parent' already"),
        (b"---\nbase_model_relation: finetune\n---\n", "base_model_relation"),
        (b"---\ntags: text\n---\n", "the tags of the card are no list"),
        (b"---\n- a\n---\n", "no mapping"),
        (b"---\n{license: mit}\n---\n", "cannot be added to"),
        (b"---\nlicense: [\n---\n", "cannot be read"),
        (b"---\nlicense: \xff\n---\n", "cannot be read"),
        (b"\xef\xbb\xbf---\nlicense: mit\n---\n", "byte order mark"),
        (b"<!-- qcbguard:begin sha256=" + b"0" * 64 + b" -->\nmine\n<!-- qcbguard:end -->\n", "edited by hand"),
        (b"<!-- qcbguard:end -->\n", "edited by hand"),
        (b"<!-- qcbguard:begin sha256=" + b"0" * 64 + b" -->\n", "edited by hand"),
    ],
)
def test_what_cannot_be_added_to_is_refused(original: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        merge_card(original, FIELDS, TAGS, SECTION)


def test_the_hubs_own_library_reads_it() -> None:
    original = b"---\nlicense: mit\ntags:\n- text-generation\n---\n# A model\n\nText.\n"
    card = ModelCard(merge_card(original, FIELDS, TAGS, SECTION).decode())
    assert card.data.base_model == "Org/Base-1.5B"
    assert card.data.license == "mit"
    assert card.data.tags == ["qcbguard", "guarded-nf4", "text-generation"]
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.text.lstrip().startswith("# A model\n\nText.\n")


def test_an_edited_section_is_not_lost() -> None:
    merged = merge_card(b"# A model\n", FIELDS, TAGS, SECTION)
    edited = merged.replace(b"yes", b"yes, and my remark")
    with pytest.raises(CheckpointError, match="edited by hand"):
        merge_card(edited, FIELDS, TAGS, SECTION)
