"""Work in the background: when it runs, what a failure does, and what is left when it ends."""

import threading
import time
from collections.abc import Iterator

import pytest

from slipstream.sessions.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test")
    yield worker
    worker.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


def test_what_is_due_first_runs_first_and_equals_in_their_order(worker: Worker) -> None:
    queued, done, ran = threading.Event(), threading.Event(), list[str]()
    worker.run(lambda: assert_set(queued))
    worker.run(lambda: ran.append("second"))
    worker.run(lambda: ran.append("third"))
    worker.run(done.set)
    worker.run(lambda: ran.append("first"), after=-60)  # was due before those
    queued.set()
    assert done.wait(60)
    assert ran == ["first", "second", "third"]


def test_after_a_failure_the_next_one_runs(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    worker.run(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    worker.run(done.set)
    assert done.wait(60)
    assert "work in the background failed" in caplog.text


def test_what_comes_sooner_than_what_is_waited_for_runs_at_once(worker: Worker) -> None:
    done = threading.Event()
    worker.run(lambda: None, after=3600)
    worker.run(done.set)
    assert done.wait(60)


def test_closing_waits_for_what_runs_and_runs_nothing_more() -> None:
    worker, began, ran = Worker("test"), threading.Event(), list[str]()

    def slow() -> None:
        began.set()
        threading.Event().wait(0.1)
        ran.append("slow")

    worker.run(slow)
    worker.run(lambda: ran.append("later"))
    assert began.wait(60)
    worker.close()
    assert ran == ["slow"]


def test_closing_ends_though_others_have_more_to_run() -> None:
    worker, closed, began = Worker("test"), threading.Event(), threading.Event()

    def go_on() -> None:
        while not closed.is_set():
            worker.run(began.set)
            time.sleep(0)

    others = [threading.Thread(target=go_on) for _ in range(4)]
    for other in others:
        other.start()
    assert_set(began)
    closing = threading.Thread(target=worker.close, daemon=True)
    closing.start()
    closing.join(60)
    ended = not closing.is_alive()
    closed.set()
    for other in others:
        other.join()
    assert ended
