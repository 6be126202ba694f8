"""Links, tables, terms and metadata of README and documentation."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.pages import tables
from benchmarks.pages.code_blocks import pages
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_LINK = re.compile(r"""(?:\]\(|src="|srcset=")([^)"\s]+)""")
_FENCED = re.compile(r"^ *(```+).*?^ *\1", re.MULTILINE | re.DOTALL)


def _prose(page: str) -> str:
    return _FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))


def _anchors(path: Path) -> set[str]:
    """Anchors as GitHub and MkDocs make them from headings, and those that are written out."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE):
        found |= set(re.findall(r"\{ #([\w-]+) \}", heading))
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()))
    return found


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for target in _LINK.findall(_prose(page)):
        if re.match(r"https?:|mailto:|\.\./\.\./actions/", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in _anchors(path), f"{page}: {target}"


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_current(page: str) -> None:
    assert tables.filled(page) == (ROOT / page).read_text(encoding="utf-8"), "run python -m benchmarks.pages.tables"


@pytest.mark.parametrize("page", pages())
def test_tables_are_whole(page: str) -> None:
    """Rows of one table have as many cells as its head, and no row stands alone."""
    width = 0
    for number, line in enumerate(_prose(page).splitlines(), 1):
        if not line.lstrip().startswith("|"):
            width = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        assert width or re.fullmatch(r"[^|]*(\|[^|]*)+\|\s*", line), f"{page}: row {number} of the prose: {line[:60]}"
        if not width:
            width = cells
            rest = _prose(page).splitlines()[number : number + 1]
            assert rest and set(rest[0].strip()) <= set("|-: "), f"{page}: a row without a table: {line[:60]}"
        assert cells == width, f"{page}: {cells} instead of {width} cells: {line[:60]}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_package_index_gets_links_that_work_there() -> None:
    text = runpy.run_path(str(ROOT / "setup.py"))["long_description"]()
    targets = _LINK.findall(_FENCED.sub("", text))
    assert targets
    source = PROJECT["urls"]["Source"]
    raw = source.replace("github.com", "raw.githubusercontent.com")
    tag = f"v{PROJECT['version']}"
    for target in targets:
        assert target.startswith("https://"), target
        for base in (f"{source}/blob/{tag}/", f"{raw}/{tag}/"):
            if target.startswith(base):
                assert (ROOT / target.removeprefix(base).partition("#")[0]).exists(), target


def test_one_address_everywhere() -> None:
    owner = PROJECT["urls"]["Source"].split("/")[3]
    for name in ("mkdocs.yml", "CITATION.cff", "SECURITY.md", "docs/guides/ci.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = re.findall(r"(?:github\.com/|--repo |uses: )([\w-]+)/qcbguard-plugins", text)
        assert named, name
        assert set(named) == {owner}, name


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\n## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# Terms that readers met before they were explained, and the words of reports.
TERMS = (
    "ELQ, QCB, box, code, grid, KL divergence, draw, plan, as planned, twin, chosen, NF4, perplexity, "
    "precaution, floor, budget, width, cell, position, calibration, error feedback, dither, manifest, "
    "coverage, target, format, payload"
)


@pytest.mark.parametrize("term", TERMS.split(", "))
def test_the_glossary_has(term: str) -> None:
    headings = re.findall(r"^#### (.+?) \{", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = {name.strip().lower() for heading in headings for name in re.split(r"[,(]", heading.replace(")", ""))}
    assert term.lower() in names


def test_glossary_entries_stand_in_order() -> None:
    headings = re.findall(r"^#### (.+?) \{", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == sorted(headings, key=str.lower)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "assets").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_load_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.search(r"(?:href|src|url)\W{1,3}https?:", text)
    assert path.with_name(path.name.replace("light", "dark")).exists()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_forms_are_yaml_and_name_scripts_that_exist(path: Path) -> None:
    import yaml

    text = path.read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    assert document
    for script in re.findall(r"(?<![\w/])\.ci/[\w-]+", text):
        assert (ROOT / script).exists() or script == ".ci/test-", script
    if path.parent.name == "workflows":
        assert document["permissions"] == {"contents": "read"}, "a workflow may read only, a job asks for more"
        scripts = document["jobs"].get("toolchain", {}).get("strategy", {}).get("matrix", {}).get("script", ())
        assert all((ROOT / ".ci" / script).exists() for script in scripts)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site needs mkdocs-material: pip install 'qcbguard-plugins[docs]'")
    mkdocs = shutil.which("mkdocs", path=str(Path(sys.executable).parent)) or shutil.which("mkdocs")
    assert mkdocs
    command = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GuardedBitsAndBytesConfig" in (tmp_path / "site" / "reference" / "api" / "index.html").read_text("utf-8")
    assert "--calibration" in (tmp_path / "site" / "reference" / "cli" / "index.html").read_text("utf-8")
