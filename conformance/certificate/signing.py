"""Signatures of a certificate by an SSH key (ed25519) that its maker has already, by `cryptography`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conformance.certificate.statement import payload_of, signed_text

REMEDY = 'install "fp8moe[sign]"'


class CannotSign(ValueError):
    """No key that can sign or check; the text says why and what to do."""


def signature_by(key: Path, envelope: Mapping[str, Any]) -> dict[str, str]:
    """A DSSE signature.

    Args:
        key: an OpenSSH private key, ed25519, without a passphrase.

    Raises:
        CannotSign: no such key, or `cryptography` is not installed.
    """
    private = private_key(key)
    signature = private.sign(signed_text(str(envelope["payloadType"]), payload_of(envelope)))
    return {"keyid": key_id(_public_text(private.public_key())), "sig": base64.b64encode(signature).decode()}


def private_key(key: Path) -> Any:
    """The key that `signature_by` signs with; read before a long run, too.

    Raises:
        CannotSign: no such key, or `cryptography` is not installed.
    """
    serialization, ed25519, _, unsupported = _cryptography()
    try:
        private = serialization.load_ssh_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, unsupported) as error:
        raise CannotSign(
            f"--sign {key}: {_why(error)}; give an OpenSSH ed25519 private key without a passphrase"
        ) from None
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise CannotSign(f"--sign {key}: a key of type {type(private).__name__}; give an ed25519 key")
    return private


def is_by(public: Path, envelope: Mapping[str, Any]) -> bool:
    """Whether one of an envelope's signatures is by this key.

    Args:
        public: an OpenSSH public key, ed25519.

    Raises:
        CannotSign: no such key, or `cryptography` is not installed.
    """
    serialization, ed25519, invalid, unsupported = _cryptography()
    try:
        key = serialization.load_ssh_public_key(public.read_bytes())
    except (OSError, ValueError, unsupported) as error:
        raise CannotSign(f"--key {public}: {_why(error)}; give an OpenSSH ed25519 public key") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise CannotSign(f"--key {public}: a key of type {type(key).__name__}; give an ed25519 key")
    text = signed_text(str(envelope["payloadType"]), payload_of(envelope))
    for signature in envelope.get("signatures", ()):
        try:
            key.verify(base64.b64decode(signature["sig"], validate=True), text)
        except (invalid, ValueError, KeyError, TypeError):
            continue
        return True
    return False


def key_id(public: str) -> str:
    """The fingerprint that `ssh-keygen -l` prints."""
    blob = base64.b64decode(public.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _public_text(key: Any) -> str:
    serialization, *_ = _cryptography()
    text: bytes = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return text.decode()


def _cryptography() -> Any:
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise CannotSign(f"signatures need cryptography ({error}); {REMEDY}") from None
    return serialization, ed25519, InvalidSignature, UnsupportedAlgorithm
