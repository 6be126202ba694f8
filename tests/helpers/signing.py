"""Sign a model with a local key through the model-signing package."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import model_signing
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path

    def sign(self, model: Path, signature: Path, *, ignore: Sequence[Path] = (), links: bool = False) -> str:
        """Sign a model and return the root digest that was signed."""
        hashing = model_signing.hashing.Config()
        hashing.set_ignored_paths(paths=[*ignore, signature]).set_allow_symlinks(links)
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=self.private)
        config.set_hashing_config(hashing).sign(model, signature)
        payload = json.loads(base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"]))
        return payload["subject"][0]["digest"]["sha256"]

    def check(self, model: Path, signature: Path) -> None:
        """Raises ValueError where the signature or the model is another."""
        config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=self.public)
        config.verify(model, signature)


def make_keys(folder: Path) -> Keys:
    key = ec.generate_private_key(ec.SECP256R1())
    keys = Keys(folder / "key.pem", folder / "key.pub")
    keys.private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    keys.public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return keys
