"""Whatever is sent, the server answers, and none of its answers is an error of its own."""

import random
from pathlib import Path

import pytest

from slipstream.models import Model
from tests.fuzz import run
from tests.server.process import running_server


def test_made_up_requests_get_no_server_error(model: Model, tmp_path: Path) -> None:
    with running_server("--state-dir", str(tmp_path)) as server, server.http() as http:
        statuses = run(http, 250, seed=0)
        assert statuses[200] > 20
        assert statuses[400] > 50
        server.wait_until_settled()
        assert server.process.poll() is None


@pytest.mark.long
def test_ten_thousand_made_up_requests(model: Model, tmp_path: Path) -> None:
    """With a new seed each time; it is in the error's request, and `python -m tests.fuzz` takes it."""
    seed = random.randrange(2**32)
    with running_server("--state-dir", str(tmp_path)) as server, server.http() as http:
        print("seed", seed)
        run(http, 10_000, seed)
        server.wait_until_settled()
