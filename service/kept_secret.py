"""Secrets of the data folder: generated on first use, readable only by their owner."""

import base64
import os
import secrets
from pathlib import Path


def kept_secret(root: Path, prefix: str = "whsec_") -> str:
    """The secret in the folder `root`: the prefix and 256 random bits in base64."""
    path = root / "secret"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = prefix + base64.b64encode(secrets.token_bytes(32)).decode("ascii")
    partial = path.with_name(f".secret.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
        file.flush()
        os.fsync(descriptor)
    try:
        os.link(partial, path)
    except FileExistsError:
        return path.read_text().strip()
    finally:
        partial.unlink()
    return secret
