"""All evidence about one example model, each piece checked by its own tool.

Scans the attacked model, guards it for NF4, verifies, scans and compares the result, writes model card and bill of
materials, signs the folder with a key that is thrown away, and checks everything as a consumer would. The pieces are
small and go to examples/evidence; the guarded folder with its weights goes to build/evidence:

    python examples/make_evidence.py
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import model_signing
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from rich.console import Console
from rich.table import Table

from qcbguard_plugins.checkpoint.subject import CLAIMS_FILE, SIGNATURE_FILE, subject_of
from qcbguard_plugins.cli import main as qcbguard
from qcbguard_plugins.cli.render.evidence import intoto

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "examples" / "models" / "attacked"
SHOWN = ROOT / "examples" / "evidence"
BUILD = ROOT / "build" / "evidence"
BASE_MODEL = "example-org/attacked"  # what the base would be called on a hub; there is no such model
KEY_FILE = "signer.pub"
FROM_FOLDER = ("README.md", "qcbguard.json", CLAIMS_FILE, SIGNATURE_FILE)


def run(expected: int, *arguments: object) -> None:
    """Call the command line; another exit code than expected ends everything."""
    code = qcbguard([str(argument) for argument in arguments])
    if code != expected:
        sys.exit(f"qcbguard {arguments[0]} exited with {code} and not with {expected}")


def make(guarded: Path, reports: Path) -> None:
    """Scan, guard, verify, scan, compare, and render what came out."""
    claims, seed = guarded / CLAIMS_FILE, ("--seed", 7)
    run(1, "scan", BASE, *seed, "--json", reports / "base-scan.json", "--attest", reports / "base-claims.jsonl")
    run(0, "guard", BASE, "--for", "nf4", *seed, "--out", guarded, "--attest", claims)
    run(0, "verify", guarded, "--json", reports / "verify.json", "--attest", claims)
    run(0, "scan", guarded, *seed, "--json", reports / "scan.json", "--attest", claims)
    run(0, "diff", guarded, "--for", "nf4", *seed, "--json", reports / "diff.json", "--attest", claims)
    names = ("verify.json", "scan.json", "diff.json")
    evidence = [part for name in names for part in ("--report", reports / name)]
    evidence += ["--claims", claims, "--base-model", BASE_MODEL]
    run(0, "card", guarded, *evidence)
    run(0, "bom", guarded, *evidence, "--out", reports / "bom.cdx.json")


def sign(guarded: Path, reports: Path) -> None:
    """Sign the folder with a fresh key; the private half never leaves memory and this folder's life."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (reports / KEY_FILE).write_bytes(public)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        hashing = model_signing.hashing.Config()
        hashing.set_ignored_paths(paths=[guarded / CLAIMS_FILE, guarded / SIGNATURE_FILE])
        signing = model_signing.signing.Config().use_elliptic_key_signer(private_key=path)
        signing.set_hashing_config(hashing).sign(guarded, guarded / SIGNATURE_FILE)


def check_claims(guarded: Path, reports: Path) -> str:
    statements = intoto.read_statements(guarded / CLAIMS_FILE) + intoto.read_statements(reports / "base-claims.jsonl")
    for statement in statements:
        intoto.validate(statement)
    digests = {subject_of(guarded).sha256, subject_of(BASE).sha256}
    assert {statement["subject"][0]["digest"]["sha256"] for statement in statements} == digests
    return f"{len(statements)} statements, about the guarded folder and its base"


def check_signature(guarded: Path, reports: Path) -> str:
    verifying = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=reports / KEY_FILE)
    verifying.verify(guarded, guarded / SIGNATURE_FILE)
    return f"root digest {subject_of(guarded).sha256[:16]}..., the subject of the claims"


def check_card(guarded: Path, reports: Path) -> str:
    data = ModelCard.load(guarded / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (BASE_MODEL, "quantized")
    return f"{data['base_model_relation']} of {data['base_model']}, tags {', '.join(data['tags'])}"


def check_bom(guarded: Path, reports: Path) -> str:
    text = (reports / "bom.cdx.json").read_text(encoding="utf-8")
    problem = JsonStrictValidator(SchemaVersion.V1_7).validate_str(text)
    assert problem is None, problem
    return f"CycloneDX {json.loads(text)['specVersion']}, {len(json.loads(text)['annotations'])} annotations"


CHECKS: dict[str, tuple[str, Callable[[Path, Path], str]]] = {
    CLAIMS_FILE: ("in-toto-attestation", check_claims),
    SIGNATURE_FILE: ("model-signing", check_signature),
    "README.md": ("huggingface_hub", check_card),
    "bom.cdx.json": ("cyclonedx-python-lib", check_bom),
}


def main() -> None:
    for folder in (BUILD, SHOWN):
        shutil.rmtree(folder, ignore_errors=True)
    guarded, reports = BUILD / "attacked-guarded", BUILD / "reports"
    reports.mkdir(parents=True)
    make(guarded, reports)
    sign(guarded, reports)
    table = Table("artifact", "checked by", "what it says")
    for name, (tool, check) in CHECKS.items():
        table.add_row(name, tool, check(guarded, reports))
    SHOWN.mkdir()
    for path in [*(guarded / name for name in FROM_FOLDER), *sorted(reports.iterdir())]:
        shutil.copyfile(path, SHOWN / path.name)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
