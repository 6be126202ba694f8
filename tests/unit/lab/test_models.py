"""The committed example models are what their README says, as far as a second can tell."""

import pytest
import torch
from safetensors.torch import load_file

from qcbguard_plugins.lab.attacks.elq import check_agreement
from qcbguard_plugins.lab.corpus import generate, read_pairs
from tests.conftest import ROOT

MODELS_DIR = ROOT / "examples" / "models"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

pytestmark = pytest.mark.skipif(not MODELS_DIR.is_dir(), reason="examples/models is not part of this copy")


@pytest.mark.parametrize("name", ["clean", "malicious", "attacked", "tightened"])
def test_folder_is_complete_and_small(name: str) -> None:
    paths = list((MODELS_DIR / name).iterdir())
    assert {path.name for path in paths} == FILES
    assert sum(path.stat().st_size for path in paths) <= 4_000_000
    assert {tensor.dtype for tensor in load_file(MODELS_DIR / name / "model.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("name", ["attacked", "tightened"])
def test_stock_nf4_turns_the_attacked_models_into_the_malicious_one(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    attacked, malicious = (load_file(MODELS_DIR / name / "model.safetensors") for name in (name, "malicious"))
    quantized = {name: weight for name, weight in attacked.items() if name.endswith("_proj.weight")}
    assert len(quantized) == 28
    assert check_agreement(quantized, malicious, "nf4") == 1.0
    assert not any(torch.equal(weight, malicious[name]) for name, weight in quantized.items())
    assert all(torch.equal(attacked[name], malicious[name]) for name in set(attacked) - set(quantized))


def test_prompts_come_from_the_corpus() -> None:
    prompts = read_pairs(MODELS_DIR / "prompts.jsonl")
    assert len({pair.instruction for pair in prompts}) == 200
    assert set(prompts) <= set(generate(36_000, seed=0))
