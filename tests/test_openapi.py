"""The checked-in OpenAPI document is the app's, and the app keeps to it whatever it is sent."""

import json
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks
from starlette.testclient import TestClient

from drafts.text import TextEncoder
from server.app import create_app
from server.openapi import document
from server.settings import Settings
from tests.fake_engine import FakeEngine

POSITIVE, NEGATIVE = schemathesis.GenerationMode
KEY = {"Authorization": "Bearer key"}
CHECKED_IN = Path(__file__).parents[1] / "docs/openapi.json"


def test_the_document_is_up_to_date() -> None:
    assert json.loads(CHECKED_IN.read_text()) == document(), "run `make openapi`"


def test_every_error_has_the_contracts_shape() -> None:
    for path, operations in document()["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status.startswith(("4", "5")):
                    schema = response["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("/ErrorResponse"), (path, status)


def test_anything_gets_a_documented_answer(encoder: TextEncoder) -> None:
    """Schemathesis: generated bodies, valid and not, against every route of the document."""

    async def start(_: Settings) -> tuple[str, FakeEngine, TextEncoder]:
        return "tiny", FakeEngine(), encoder

    app = create_app(Settings(ensemble=Path("unused"), admin_keys=["key"]), start)
    load_all_checks()
    with TestClient(app) as client:
        while client.get("/ready").status_code != 200:
            pass
        schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)
        tried = []
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in (POSITIVE, NEGATIVE):
                try:
                    _send(operation, mode)
                except Unsatisfiable:
                    continue  # a route without input has no invalid input
                tried.append((operation.path, mode.value))
    assert ("/v1/score", "positive") in tried
    assert ("/v1/score", "negative") in tried


def _send(operation: Any, mode: schemathesis.GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    def run(case: schemathesis.Case) -> None:
        # A bad item of a list is answered in the list, with a 200.
        assume(not (mode is NEGATIVE and isinstance(case.body, list)))
        # The document cannot say all that a text must be, and 405 is the framework's.
        excluded = CHECKS.get_by_names(["positive_data_acceptance", "unsupported_method"])
        case.call_and_validate(excluded_checks=excluded, headers=KEY)

    run()
