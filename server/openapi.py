"""Prints the OpenAPI document: `make openapi` writes docs/openapi.json with it, a test compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.app import create_app
from server.settings import Settings


def document() -> dict[str, Any]:
    """The OpenAPI document of the service."""
    return create_app(Settings(ensemble=Path("unused"))).openapi()


if __name__ == "__main__":
    print(json.dumps(document(), indent=1, sort_keys=True))
