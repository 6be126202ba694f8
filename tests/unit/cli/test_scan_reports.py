"""The renderings of a scan, from a report made by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qcbguard_plugins.cli.render.advice import explanation, headline, next_steps, p_text, printable, visible
from qcbguard_plugins.cli.render.sarif import to_sarif
from qcbguard_plugins.cli.render.scan_html import render_html
from qcbguard_plugins.cli.render.scan_text import render_markdown, render_scan
from qcbguard_plugins.detection.weights.report import (
    FormatEvidence,
    ScannedTensor,
    ScanReport,
    SkippedTensor,
    TensorEvidence,
    TestEvidence,
    Verdict,
)

NAME = "model.layers.0.mlp.up_proj.weight"


def make_report(verdict: Verdict) -> ScanReport:
    attacked = verdict == "attacked"
    p = 1e-9 if attacked else 1.0
    found = TestEvidence(effect=0.3 if attacked else 0.0, raw_p_value=p, p_value=p)
    return ScanReport(
        created="2026-01-01T00:00:00+00:00",
        versions={"qcbguard-plugins": "0.1.0"},
        model="some model",
        file_kind="safetensors",
        verdict=verdict,
        p_value=p,
        alpha=0.01,
        likely_formats=("nf4",) if attacked else (),
        family="tightened box" if attacked else "",
        meaning="Weights near the boundary are missing." if attacked else "",
        outlier_p=1.0,
        seed=7,
        formats=(
            FormatEvidence(
                format="nf4",
                attacked=attacked,
                p_value=p,
                spectral=found,
                residual=found,
                num_on_grid=0,
                histogram=(1 / 32,) * 32,
                expected_histogram=(1 / 32,) * 32,
                boundary_density=1.0,
                peak_margin=0.2,
            ),
        ),
        tensors=(
            ScannedTensor(
                name=NAME,
                layer=0,
                projection="mlp.up_proj",
                shape=(64, 64),
                dtype="float16",
                num_weights=4096,
                num_tested=4096,
                outlier_share=0.0,
                outlier_p=1.0,
                layer_distance=0.0,
            ),
        ),
        evidence=(
            TensorEvidence(
                name=NAME,
                format="nf4",
                on_grid=False,
                spectral_effect=0.35,
                spectral_p=p,
                residual_effect=0.1,
                residual_p=1.0,
            ),
        ),
        skipped=(SkippedTensor(name="b.weight", reason="holds NaN"),) if verdict == "incomplete" else (),
        num_others=3,
        elapsed_s=1.0,
    )


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("attacked", 1), ("incomplete", 3)])
def test_every_rendering_says_the_same(verdict: Verdict, code: int) -> None:
    report = make_report(verdict)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_scan(report))
    for text in (console.export_text(), render_markdown(report), render_html(report)):
        assert headline(report) in text
        assert ("No marks in the weights" in text) == (code == 0)
        assert report.coverage in text
    assert report.exit_code == code == to_sarif(report)["runs"][0]["invocations"][0]["exitCode"]


def test_a_report_survives_its_json() -> None:
    report = make_report("attacked")
    assert ScanReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValueError, match="extra"):
        ScanReport.model_validate({**report.model_dump(), "extra": 1})


@pytest.mark.parametrize(("verdict", "rules"), [("clean", []), ("attacked", ["QCB001"]), ("incomplete", ["QCB003"])])
def test_the_shape_of_a_sarif_log(verdict: Verdict, rules: list[str]) -> None:
    run = to_sarif(make_report(verdict))["runs"][0]
    assert [result["ruleId"] for result in run["results"]] == rules
    listed = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    for result in run["results"]:
        assert listed[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning") and result["message"]["text"]
        location = result["locations"][0]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "some%20model"
        assert location["logicalLocations"][0]["fullyQualifiedName"]


def test_commands_are_quoted() -> None:
    commands = [command for _, command in next_steps(make_report("attacked")) if command]
    assert commands == [
        "qcbguard diff 'some model' --for nf4",
        "qcbguard guard 'some model' --for nf4 --out 'some model-guarded'",
    ]


def test_words_for_numbers_and_names() -> None:
    assert p_text(1e-40) == "below 1e-12" and p_text(0.00012) == "1.2e-04" and p_text(0.5) == "0.500"
    assert printable("a\x1b[2Jb\u202e") == "a?[2Jb?" and len(printable("x" * 500)) == 120
    assert visible("") == "(empty)" and visible(" ") == "(space)" and visible("a\nb") == "a \u23ce b"
    assert explanation(make_report("clean")).startswith("Nothing stands out in the 1 tensors")
