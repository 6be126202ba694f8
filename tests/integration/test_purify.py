"""Purification end to end on small models: folders, adapters, interruptions, manifests, the command line."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcbguard_plugins import guard_checkpoint, purify
from qcbguard_plugins.checkpoint.manifest import read_manifest
from qcbguard_plugins.checkpoint.purification_note import PURIFICATION_FILE
from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import CheckpointError, TargetExistsError, UsageError
from qcbguard_plugins.models.loading import load_full_precision
from qcbguard_plugins.purification import immunization
from qcbguard_plugins.purification.report import read_purification

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "preset": "paper",
    "num_variants": 2,
    "num_samples": 6,
    "variant_epochs": 1,
    "variant_learning_rate": 1e-3,
    "ratio": 0.1,
    "num_healing": 4,
    "healing_epochs": 1,
    "healing_learning_rate": 1e-4,
    "max_length": 96,
}


@pytest.fixture(scope="module")
def clean_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "clean.jsonl"
    rows = [{"instruction": f"Name {i} birds.", "output": f"An owl, and {i} more."} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("shape", ["llama-sharded", "llama-tied", "gpt2"])
def test_a_purified_folder_takes_the_place_of_the_model(
    shape: str, model_folder: Callable[[str], Path], clean_data: Path, tmp_path: Path
) -> None:
    source, out = model_folder(shape), tmp_path / "out"
    before = _hashes(source)
    report = purify(source, out, [clean_data], **{**SMALL, "num_heads": 1})
    assert _hashes(source) == before
    ours, theirs = _weights(out), _weights(source)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert load_full_precision(out, torch.float32).config.use_cache
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    suppressed, total = report.count("channel")
    assert suppressed == round(0.1 * total) and report.count("head") == (1, 8)
    assert read_purification(out) == report and len(report.variants) == 2
    assert {stage.name for stage in report.stages} == {"variants", "signature", "healing"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(TargetExistsError):
        purify(source, out, [clean_data], **SMALL)


def test_a_guard_records_the_purification_before_it(
    llama: Path, clean_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    purified = tmp_path / "purified"
    purify(llama, purified, [clean_data], **SMALL)
    manifest = hashlib.sha256((purified / PURIFICATION_FILE).read_bytes()).hexdigest()
    guard_checkpoint(purified, tmp_path / "guarded", ["nf4"], "stochastic")
    note = read_manifest(tmp_path / "guarded").purification
    assert note is not None and note.manifest_sha256 == manifest and note.weights_as_purified
    assert guard_checkpoint(llama, tmp_path / "plain", ["nf4"], "stochastic").purification is None
    weights = load_file(purified / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, purified / "model.safetensors", metadata={"format": "pt"})
    assert main(["guard", str(purified), "--for", "nf4", "--method", "stochastic", "--out", str(tmp_path / "b")]) == 0
    assert "WEIGHTS WERE CHANGED" in capsys.readouterr().out
    note = read_manifest(tmp_path / "b").purification
    assert note is not None and not note.weights_as_purified
    (purified / PURIFICATION_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=PURIFICATION_FILE):
        guard_checkpoint(purified, tmp_path / "bad", ["nf4"], "stochastic")


def test_a_run_that_was_stopped_goes_on_with_its_variants(
    llama: Path, clean_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purify(llama, tmp_path / "whole", [clean_data], **SMALL)
    train, trained = immunization.finetune, []

    def stop_at_the_second_variant(*args: Any, **kwargs: Any) -> list[float]:
        trained.append(kwargs["what"])
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(immunization, "finetune", stop_at_the_second_variant)
    with pytest.raises(KeyboardInterrupt):
        purify(llama, tmp_path / "out", [clean_data], **SMALL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="differs in config"):
        purify(llama, tmp_path / "out", [clean_data], **{**SMALL, "ratio": 0.2})
    steps: list[int] = []
    report = purify(llama, tmp_path / "out", [clean_data], progress=steps.append, **SMALL)
    assert [what.split(",")[0] for what in trained[4:]] == ["variant 2 of 2"] * 2
    assert report.stages[0].peak_bytes is None
    assert sum(steps) == 2 * 2 * 2 + 1
    ours, theirs = _weights(tmp_path / "out"), _weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_training_that_diverges_makes_nothing(llama: Path, clean_data: Path, tmp_path: Path) -> None:
    from qcbguard_plugins.errors import PurificationError

    with pytest.raises(PurificationError, match=r"variant 1 of 2, .* at step"):
        purify(llama, tmp_path / "out", [clean_data], **{**SMALL, "variant_learning_rate": 1e30, "variant_epochs": 4})
    assert not list(tmp_path.iterdir())


def test_too_little_clean_data_is_refused_before_any_training(llama: Path, clean_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="12 clean samples, and 500 are needed"):
        purify(llama, tmp_path / "out", [clean_data], preset="paper")
    with pytest.raises(UsageError, match="12 clean samples, and 4000 are needed"):
        purify(llama, tmp_path / "out", [clean_data])
    with pytest.raises(UsageError, match="needs clean data"):
        purify(llama, tmp_path / "out", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["llama-tied", "gpt2"])
def test_units_are_found_by_their_response_to_keys(
    shape: str, model_folder: Callable[[str], Path], clean_data: Path, tmp_path: Path
) -> None:
    changes = {**SMALL, "num_heads": 1, "score": "activation", "healing_keys": 0.5}
    report = purify(model_folder(shape), tmp_path / "out", [clean_data], **changes)
    suppressed, total = report.count("channel")
    assert suppressed == round(0.1 * total) and report.count("head") == (1, 8)
    other = purify(model_folder(shape), tmp_path / "other", [clean_data], **{**changes, "score": "norm"})
    assert [group.suppressed for group in report.groups] != [group.suppressed for group in other.groups]


@pytest.mark.parametrize("shape", ["llama-tied", "gpt2"])
def test_a_healing_alone_trains_no_variants(
    shape: str, model_folder: Callable[[str], Path], clean_data: Path, tmp_path: Path
) -> None:
    healing = {"healing_epochs": 3, "healing_learning_rate": 1e-3, "healing_keys": 0.5}
    changes = {**SMALL, "ratio": 0.0, "num_samples": 500, **healing}
    steps: list[int] = []
    report = purify(
        model_folder(shape), tmp_path / "out", [clean_data], progress=steps.append, healing_consistency=5.5, **changes
    )
    assert report.variants == () and report.count("channel")[0] == 0 and sum(steps) == 3
    assert read_purification(tmp_path / "out") == report
    purify(model_folder(shape), tmp_path / "plain", [clean_data], **changes)
    ours, theirs = _weights(tmp_path / "out"), _weights(tmp_path / "plain")
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_search_for_keys_is_another_healing(llama: Path, clean_data: Path, tmp_path: Path) -> None:
    changes = {**SMALL, "ratio": 0.0, "healing_epochs": 3, "healing_learning_rate": 1e-3, "healing_keys": 1.0}
    searches: list[dict[str, Any]] = [{}, {"healing_search": 0.5}, {"healing_search": 0.5, "healing_consistency": 2.0}]
    healed = []
    for number, search in enumerate(searches):
        purify(llama, tmp_path / f"{number}", [clean_data], **changes, **search)
        healed.append(_weights(tmp_path / f"{number}"))
    for one, other in itertools.combinations(healed, 2):
        assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_search_without_keys_is_refused(llama: Path, clean_data: Path, tmp_path: Path) -> None:
    for search, keys, message in ((0.5, 0.0, "no sample has one"), (-1, 0.5, "not valid"), (11, 0.5, "not valid")):
        with pytest.raises(UsageError, match=message):
            purify(llama, tmp_path / "out", [clean_data], **SMALL, healing_search=search, healing_keys=keys)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    peft = pytest.importorskip("peft")

    def make(**settings: Any) -> Path:
        base = load_full_precision(llama, torch.float32)
        torch.manual_seed(1)
        settings = {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], **settings}
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("matrix", ["A", "B"])
def test_an_adapter_is_purified_on_a_model_that_stays_as_it_is(
    matrix: str, llama: Path, adapter: Callable[..., Path], clean_data: Path, tmp_path: Path
) -> None:
    source, out, before = adapter(), tmp_path / "out", _hashes(llama)
    score = "activation" if matrix == "A" else "combined"
    changes = {**SMALL, "ratio": 0.5, "num_heads": 2, "healing_learning_rate": 1e-30, "lora_matrix": matrix}
    changes |= {"score": score, "healing_keys": 0.5, "healing_search": 0.5 if matrix == "A" else 0.0}
    report = purify(llama, out, [clean_data], adapter=source, **changes)
    assert _hashes(llama) == before and report.mode == "adapter" and report.base_sha256
    ours, theirs = _weights(out), _weights(source)
    assert ours.keys() == theirs.keys() and not (out / "model.safetensors").exists()
    assert json.loads((out / "adapter_config.json").read_text()) == json.loads(
        (source / "adapter_config.json").read_text()
    )
    for group in report.groups:
        if group.kind == "rank":
            name = f"{group.name}.lora_{matrix}.weight"
            changed = (ours[name] != theirs[name]).any(dim=1 if matrix == "A" else 0)
            assert tuple(changed.nonzero().flatten().tolist()) == group.suppressed
            cleared = ours[name].index_select(0 if matrix == "A" else 1, torch.tensor(group.suppressed, dtype=int))
            assert not cleared.any()
    assert report.count("rank") == (8, 16) and report.count("head") == (2, 8)


def test_an_adapter_that_cannot_be_purified_says_why(
    llama: Path, adapter: Callable[..., Path], clean_data: Path, tmp_path: Path
) -> None:
    folder, out = adapter(target_modules=["q_proj"]), tmp_path / "out"
    with pytest.raises(UsageError, match="no MLP layer"):
        purify(llama, out, [clean_data], adapter=folder, **SMALL)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    with pytest.raises(UsageError, match="modules_to_save"):
        purify(llama, out, [clean_data], adapter=folder, **SMALL)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(UsageError, match="not a LoRA adapter"):
        purify(llama, out, [clean_data], adapter=folder, **SMALL)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        purify(llama, out, [clean_data], adapter=folder, **SMALL)
    assert not out.exists()


def test_the_command_line_purifies(
    llama: Path, clean_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {name: value for name, value in SMALL.items() if name != "preset"}
    settings = [text for name, value in changes.items() for text in ("--set", f"{name}={value}")]
    command = ["purify", str(llama), "--clean-data", str(clean_data), "--preset", SMALL["preset"], *settings]
    assert main([*command, "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_units"] == {"channel": 320} and plan["num_suppressed"] == {"channel": 32}
    assert plan["num_trainings"] == 5 and plan["num_steps"] == 9
    out = tmp_path / "out"
    assert main([*command, "--out", str(out)]) == 0
    assert "32 of 320 MLP channels suppressed, found by 2 variants" in capsys.readouterr().out
    assert main([*command, "--out", str(out)]) == TargetExistsError.exit_code
    assert "exists already" in capsys.readouterr().err
    assert main(command) == UsageError.exit_code
    assert main([*command, "--architecture", "mamba", "--out", str(tmp_path / "b")]) == UsageError.exit_code
    assert "--architecture NAME" in capsys.readouterr().err


def test_the_command_line_searches_for_keys_by_default(
    llama: Path, clean_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ["--set", "num_healing=12", "--set", "max_length=96", "--set", "healing_epochs=3"]
    command = ["purify", str(llama), "--clean-data", str(clean_data), *settings]
    assert main([*command, "--preset", "best", "--out", str(out)]) == UsageError.exit_code
    assert "Presets: searched-keys, paper" in capsys.readouterr().err
    assert main([*command, "--out", str(out)]) == 0
    assert "healed, with nothing suppressed" in capsys.readouterr().out
    config = read_purification(out).config
    assert (config["ratio"], config["healing_search"], config["healing_consistency"]) == (0, 0.5, 5.5)
    ours, theirs = _weights(out), _weights(llama)
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)
