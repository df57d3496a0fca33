"""Ray's authentication, always set explicitly and before Ray is imported, since Ray reads it once at import.

Left unset, Ray 2.60 decides by the machine: a token file that happens to exist turns authentication on.
"""

import os
import secrets
from pathlib import Path


def authenticate(address: str | None) -> None:
    """Choose the mode for the cluster at `address`, or for one started in this process.

    A started cluster gets a token of its own that is never written to disk. An existing one is met with the mode of
    the environment, and without one with a token whenever a token is there.
    """
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        return
    token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    token = token or (Path.home() / ".ray" / "auth_token").exists()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if token else "disabled")
