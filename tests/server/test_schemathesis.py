"""What schemathesis makes of the OpenAPI description: no server's error, and no answer that the description hasn't."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.models import Model
from tests.server.process import running_server
from tests.waiting import HANG

OPTIONS = ("--phases=coverage,fuzzing,stateful", "--max-examples=200", "--continue-on-failure", "--no-color")
UNWANTED = "negative_data_rejection,positive_data_acceptance,allow_header_conformance"
"""Some rules are more than a schema says, numbers may come as text, and `compact` might be a response's id, too."""


@pytest.mark.long
def test_answers_are_as_described(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    command = [Path(sys.executable).with_name("schemathesis"), "run", *OPTIONS, f"--exclude-checks={UNWANTED}"]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with running_server("--state-dir", str(tmp_path / "state")) as server:
        options = (f"--request-timeout={HANG}", "--generation-database=none", f"{server.url}/openapi.json")
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        server.wait_until_settled()
        assert not [
            name for name in server.metrics() if name.startswith("slipstream_http_requests_total") and " 5" in name
        ]
