"""Schemathesis over the interface's own document: whatever it makes up is answered as the document says."""

import json
import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from running import running

from s3dit.serve.bounds import Limits
from s3dit.serve.server import Serving

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.negative_data_rejection, checks.unsupported_method,
]  # fmt: skip
EXAMPLES = 400 if os.environ.get("S3DIT_SLOW") == "1" else 3


@pytest.fixture(scope="module")
def document():
    """Of a server that grants so little that what is right is drawn quickly."""
    limits = Limits(pictures=1, steps=2, side=64, pixels=64 * 64)
    with running(Serving(name="tiny", limits=limits)) as server:
        found = json.loads(server.ask("GET", "/openapi.json")[2])
        made = schemathesis.openapi.from_dict(found)
        made.config.update(base_url=server.url)
        # Of its own list 413 is missing: what is wrong may be too large besides.
        made.config.checks.negative_data_rejection.expected_statuses = ["400", "413", "415"]
        yield made


@pytest.mark.longer
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
def test_what_is_made_up_is_answered(document, path, mode):
    """What the document allows, and what it does not."""

    @given(document[path]["POST"].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def answered(case):
        case.call_and_validate(checks=CHECKS)

    answered()
