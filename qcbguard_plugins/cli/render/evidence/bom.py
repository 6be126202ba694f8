"""A guarded folder as a CycloneDX bill of materials.

References:
    CycloneDX 1.7.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_URL, uuid5

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.records import DISTRIBUTION
from qcbguard_plugins.checkpoint import open_checkpoint
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE
from qcbguard_plugins.cli.render.evidence.facts import Evidence, guard_sentences, measured_sentences
from qcbguard_plugins.cli.render.evidence.intoto import timestamp
from qcbguard_plugins.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

_MODEL, _BASE = "model", "base"
#: Prefix of the property that says how many tensors are of a type: a format, or the dtype of what is not guarded.
TENSOR_TYPE: Final = "qcbguard:tensor-type:"
_ROOT_DIGEST = "qcbguard:model-signing:root-digest"


def to_bom(evidence: Evidence, base_model: str = "") -> str:
    """The bill of materials as JSON, validated by the library that made it.

    The model is one component, its files are components in it, and its base is its ancestor. One property per tensor
    type gives the number of its tensors. The guard and each report are an annotation.

    Args:
        evidence: The folder and reports about it.
        base_model: The base's name on the Hugging Face hub, for its package URL.

    Raises:
        MissingDependencyError: ``cyclonedx-python-lib`` is missing.
        CheckpointError: The outcome does not follow the CycloneDX schema.
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType, Pedigree
        from cyclonedx.output.json import JsonV1Dot7
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise MissingDependencyError(
            f"a bill of materials needs cyclonedx-python-lib: {error}",
            remedy="pip install 'qcbguard-plugins[evidence]'",
        ) from error

    guard, subject = evidence.guard, evidence.subject
    base = Component(
        name=guard.source,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=_BASE,
        purl=_hub_url(base_model) if base_model else None,
        components=_files(_BASE, {file.name: file.sha256_in for file in guard.files}),
    )
    model = Component(
        name=subject.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=_MODEL,
        pedigree=Pedigree(ancestors=[base], notes=" ".join(guard_sentences(guard))),
        properties=_properties(evidence),
        components=_files(_MODEL, subject.files),
    )
    tool = Component(name=DISTRIBUTION, type=ComponentType.APPLICATION, version=guard.versions.get(DISTRIBUTION))
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"sha256:{subject.sha256}"))
    bom.metadata.component = model
    bom.metadata.timestamp = datetime.fromisoformat(guard.created)
    bom.metadata.tools.components.add(tool)
    document = json.loads(JsonV1Dot7(bom).output_as_string())
    # The library writes all of this release except annotations; it validates them below with the rest.
    document["annotations"] = list(_annotations(evidence, {"component": _tool_of(document)}))
    text = json.dumps(document, indent=2) + "\n"
    problem = JsonStrictValidator(SchemaVersion.V1_7).validate_str(text)
    if problem is not None:
        raise CheckpointError(f"the bill of materials does not follow the CycloneDX 1.7 schema: {problem}")
    return text


def tensor_types(evidence: Evidence) -> Counter[str]:
    """Number of tensors of each type: what it was planned as, or its dtype where it is not guarded."""
    checkpoint = open_checkpoint(evidence.folder)
    guard = evidence.guard
    planned = {tensor.key: "+".join(tensor.formats or guard.formats) for tensor in guard.tensors}
    return Counter(
        planned.get(key) or ("other" if entry.dtype is None else dtype_name(entry.dtype))
        for key, entry in checkpoint.tensors.items()
    )


def _properties(evidence: Evidence) -> list[Any]:
    from cyclonedx.model import Property

    guard = evidence.guard
    values = {
        _ROOT_DIGEST: f"sha256:{evidence.subject.sha256}",
        "qcbguard:manifest": f"sha256:{evidence.subject.files[MANIFEST_FILE]}",
        "qcbguard:formats": ",".join(guard.formats),
        "qcbguard:method": guard.method,
        "qcbguard:seed": str(guard.seed),
        "qcbguard:coverage": guard.coverage,
        **{f"{TENSOR_TYPE}{name}": str(number) for name, number in sorted(tensor_types(evidence).items())},
    }
    named = [Property(name=name, value=value) for name, value in values.items()]
    return named + [Property(name="qcbguard:unguarded", value=name) for name in guard.unguarded]


def _files(owner: str, files: Mapping[str, str]) -> list[Component]:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"{owner}/{name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        )
        for name, digest in files.items()
    ]


def _hub_url(base_model: str) -> Any:
    from packageurl import PackageURL

    namespace, _, name = base_model.rpartition("/")
    return PackageURL("huggingface", namespace or None, name)


def _tool_of(document: dict[str, Any]) -> dict[str, Any]:
    tool: dict[str, Any] = document["metadata"]["tools"]["components"][0]
    return {name: value for name, value in tool.items() if name != "bom-ref"}


def _annotations(evidence: Evidence, annotator: dict[str, Any]) -> Iterable[dict[str, Any]]:
    said = [("guard", evidence.guard.created, guard_sentences(evidence.guard))]
    said += [(report.kind, report.created, measured_sentences(report)) for report in evidence.reports]
    for number, (kind, created, sentences) in enumerate(said):
        yield {
            "bom-ref": f"{kind}-{number}",
            "subjects": [_MODEL],
            "annotator": annotator,
            "timestamp": timestamp(created),
            "text": " ".join(sentences),
        }
