"""The command line as a person meets it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qcbguard_plugins.cli import main


def qcbguard(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "120"}
    command = [sys.executable, "-m", "qcbguard_plugins.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_guard_then_verify(llama: Path, tmp_path: Path) -> None:
    target, report = tmp_path / "guarded", tmp_path / "report.json"
    done = qcbguard("guard", llama, "--for", "nf4", "--out", target, "--json", report, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "14 of 14 target tensors guarded for nf4 with feedback" in done.stdout
    assert "guarding for nf4: 100%" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(report.read_text()) == json.loads((target / "qcbguard.json").read_text())

    done = qcbguard("verify", target, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "14 of 14 guarded tensors" in done.stdout

    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    done = qcbguard("verify", target, "--json", "-", cache=tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert [tensor["name"] for tensor in found["tensors"] if not tensor["as_planned"]] == [
        "model.layers.0.mlp.up_proj.weight"
    ]


def test_dry_run_lists_every_target_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = qcbguard("guard", llama, "--for", "int8", "--dry-run", "--json", "-", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["kind"], plan["schema_version"], len(plan["tensors"])) == ("plan", 2, 14)
    assert plan["peak_bytes"] > 0
    assert plan["estimated_s"] > 0
    done = qcbguard("guard", llama, "--for", "int8", "--dry-run", cache=tmp_path)
    assert "model.layers.1.mlp.down_proj.weight" in done.stdout
    assert "64x160" in done.stdout
    assert "peak memory about" in done.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_an_unguarded_tensor_is_listed_and_exits_3(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "guarded"
    arguments = ("--method", "stochastic", "--seed", 1, "--ignore", "re:.*layers.0.*q_proj")
    done = qcbguard("guard", llama, "--for", "fp4", "--out", target, *arguments, cache=tmp_path)
    assert done.returncode == 3
    assert "UNGUARDED  model.layers.0.self_attn.q_proj.weight" in done.stdout
    assert "13 of 14 target tensors guarded" in done.stdout
    assert qcbguard("verify", target, cache=tmp_path).returncode == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["guard"], 4, "Missing argument 'MODEL'"),
        (["guard", "MODEL"], 4, "Missing option '--for'"),
        (["guard", "MODEL", "--for", "nf4"], 4, "--out is missing"),
        (["guard", "MODEL", "--for", "nf5", "--out", "x"], 4, "unknown format 'nf5'"),
        (["guard", "MODEL", "--for", "nf4-b63", "--out", "x"], 4, "block size 63"),
        (["guard", "MODEL", "--for", "nf4,nf4", "--out", "x"], 4, "names a format twice"),
        (["guard", "MODEL", "--for", "nf4", "--out", "x", "--method", "magic"], 4, "unknown method 'magic'"),
        (["guard", "MODEL", "--for", "nf4", "--out", "x", "--set", "width"], 4, "is not name=value"),
        (["guard", "MODEL", "--for", "nf4", "--out", "x", "--set", "width=9"], 4, "between 0 and 0.5"),
        (["guard", "MODEL", "--for", "nf4", "--out", "x", "--set", "depth=1"], 4, "no parameter depth"),
        (["guard", "MODEL", "--for", "nf4", "--out", "x", "--seed", "-1"], 4, "--seed"),
        (["guard", "MODEL", "--for", "nf4", "--out", "x", "--ignore", "*nothing*"], 4, "matches none of 14"),
        (["guard", "MODEL", "--for", "nf4", "--out", "x", "--calibration", "none.txt"], 2, "cannot be read"),
        (["guard", "nowhere", "--for", "nf4", "--out", "x"], 2, "not a folder"),
        (["guard", "MODEL", "--for", "nf4", "--out", "MODEL"], 2, "exists already"),
        (["verify", "MODEL"], 2, "no plan to compare with"),
        (["verify", "nowhere"], 2, "does not exist"),
        (["frobnicate"], 4, "No such command"),
        (["guard", "--frobnicate"], 4, "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_and_has_its_exit_code(
    arguments: list[str], code: int, message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [str(llama) if part == "MODEL" else str(tmp_path / "x") if part == "x" else part for part in arguments]
    assert main(filled) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "x").exists()


def test_a_report_is_not_written_over(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    report.write_text("mine")
    assert main(["guard", str(llama), "--for", "nf4", "--dry-run", "--json", str(report)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert report.read_text() == "mine"


def test_list_names_formats_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"nf4", "fp4", "int8"} <= listed["formats"].keys()
    assert {"efrap", "feedback", "flipguard", "noise", "quantguard", "qvec", "stochastic"} <= listed["methods"].keys()
    assert listed["methods"]["feedback"]["needs_calibration"]
    assert main(["list"]) == 0
    assert "width=auto" in capsys.readouterr().out


def test_doctor_asks_the_real_quantizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    for name in ("nf4", "fp4", "int8", "gguf:Q4_K_M", "bitsandbytes in transformers"):
        assert checks[name]["status"] == "ok", checks[name]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qcbguard, version")
