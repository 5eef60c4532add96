"""Sandboxes: what crashes, hangs or gobbles memory there ends there, and the next call is answered."""

import pytest

from slipstream.sandbox import Allowance, Sandbox, SandboxDiedError, SandboxError


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "secret")
    return Sandbox("tests.unit.foreign:Foreign", allowance=Allowance(seconds=0.3, memory=2**29))


def test_results_and_errors_come_back(sandbox: Sandbox) -> None:
    assert sandbox.call("echo", {"a": [1, "\ud800"]}) == {"a": [1, "\ud800"]}
    with pytest.raises(SandboxError, match="no such thing"):
        sandbox.call("fail")
    with pytest.raises(SandboxError):
        sandbox.call("recurse", 0)
    assert sandbox.deaths == 0
    sandbox.close()


def test_the_environment_stays_outside(sandbox: Sandbox) -> None:
    assert sandbox.call("secret") is None
    sandbox.close()


@pytest.mark.parametrize("method", ["loop", "hold_the_lock", "crash"])
def test_what_ends_the_worker_ends_nothing_else(sandbox: Sandbox, method: str) -> None:
    with pytest.raises(SandboxDiedError):
        sandbox.call(method)
    assert sandbox.deaths == 1
    assert sandbox.call("echo", 1) == 1
    sandbox.close()


def test_memory_that_nobody_granted_is_not_given(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError):
        sandbox.call("gobble")
    assert sandbox.call("echo", 1) == 1
    sandbox.close()


def test_a_worker_that_waits_is_killed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.call("echo", 1)
    monkeypatch.setattr("slipstream.sandbox.sandbox._WALL_PER_CPU_SECOND", 1)
    with pytest.raises(SandboxDiedError):
        sandbox.call("sleep")
    sandbox.close()
