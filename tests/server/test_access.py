"""Who gets in: keys and tenants, names and origins, and what a web page may not do."""

import base64
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import NotFoundError, OpenAI

from slipstream.models import Model
from slipstream.server.keys import KeyFileError, KeyRing, add_key
from tests.server.process import MODEL, Server, running_server
from tests.waiting import HANG, wait_until

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
TEXT = "Quokkas counted by the lighthouse keeper"


def make_key(file: Path, tenant: str, *options: str) -> str:
    command = [sys.executable, "-m", "slipstream", "make-key", str(file), "--tenant", tenant, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


STRANGERS = ("bob", "erin", "frank", "gina", "hank", "iris", "jack")


def body(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0.0, **fields}


class Shared:
    """A server for two tenants and an operator, with state on disk."""

    def __init__(self, server: Server, keys: Path, state: Path, **by_name: str) -> None:
        self.server, self.keys, self.state, self.by_name = server, keys, state, by_name

    def http(self, name: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.by_name[name]}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=HANG)

    def openai(self, name: str) -> OpenAI:
        return OpenAI(base_url=f"{self.server.url}/v1", api_key=self.by_name[name], max_retries=0, timeout=HANG)


@pytest.fixture(scope="module")
def shared(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    keys, state = folder / "keys.toml", folder / "state"
    state.mkdir(mode=0o755)
    by_name = {"alice": make_key(keys, "alice"), **{name: add_key(keys, name) for name in STRANGERS}}
    by_name["root"] = make_key(keys, "ops", "--operator", "--name", 'the "boss"')
    patient = ("--read-timeout", str(HANG))  # with requests whose bodies never come
    with running_server("--api-keys-file", str(keys), "--state-dir", str(state), *patient) as server:
        server.api_key = by_name["root"]
        yield Shared(server, keys, state, **by_name)


def test_a_made_key_is_kept_as_a_digest_alone(shared: Shared) -> None:
    text = shared.keys.read_text()
    assert not [key for key in shared.by_name.values() if key in text]
    assert shared.keys.stat().st_mode & 0o777 == 0o600
    assert all(len(key) > 40 for key in shared.by_name.values())


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/openapi.json", "/v1/sessions"])
def test_a_stranger_gets_nothing(shared: Shared, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer sk-slipstream-wrong"}, {"x-api-key": ""}):
        response = httpx.get(shared.server.url + path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(shared.server.url + "/health").json()["status"] == "ok"


def test_metrics_are_for_operators(shared: Shared) -> None:
    with shared.http("alice") as alice, shared.http("root") as root:
        assert alice.get("/metrics").status_code == 403
        assert root.get("/metrics").status_code == 200


def test_keys_come_and_go_while_the_server_runs(shared: Shared) -> None:
    before = shared.keys.read_text()
    new = make_key(shared.keys, "carol")
    headers = {"Authorization": f"Bearer {new}"}
    wait_until(lambda: httpx.get(shared.server.url + "/v1/models", headers=headers).status_code == 200)
    shared.keys.write_text("[[keys]]\nnonsense = 1\n")  # the keys of before stay
    time.sleep(1.1)
    assert httpx.get(shared.server.url + "/v1/models", headers=headers).status_code == 200
    shared.keys.write_text(before)
    wait_until(lambda: httpx.get(shared.server.url + "/v1/models", headers=headers).status_code == 401)


def test_a_key_and_a_tenant_have_requests_of_their_own(shared: Shared) -> None:
    """One that is still being sent is under way; the limits of one tenant are nothing to another."""
    before = shared.keys.read_text()
    free, held = (add_key(shared.keys, "grace") for _ in range(2))
    shared.keys.write_text(f"{shared.keys.read_text()}max_requests = 1\n[tenants.grace]\nmax_requests = 2\n")
    address = httpx.URL(shared.server.url)

    def refusal(key: str) -> str:
        response = httpx.post(shared.server.url + CHAT, json=body(), headers={"x-api-key": key}, timeout=HANG)
        if response.is_success:
            return ""
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        return str(response.json()["error"]["message"])

    def begin(key: str) -> socket.socket:
        connection = socket.create_connection((address.host, address.port), timeout=HANG)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode())
        return connection

    wait_until(lambda: httpx.get(f"{shared.server.url}/v1/models", headers={"x-api-key": held}).is_success)
    with shared.http("alice") as alice:
        with begin(held):
            wait_until(lambda: refusal(held) != "")
            assert refusal(held).startswith("this key has 1 requests under way")
            assert not refusal(free)
            with begin(free):
                wait_until(lambda: refusal(free) != "")
                assert refusal(free).startswith("this tenant has 2 requests under way")
                assert alice.post(CHAT, json=body()).is_success
        wait_until(lambda: not refusal(free) and not refusal(held))
    metrics = shared.server.metrics()
    assert metrics["slipstream_refusals_total max_requests_of_key"] > 0
    assert metrics["slipstream_refusals_total max_requests_of_tenant"] > 0
    shared.keys.write_text(before)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("max_requests = 0", "key 1: max_requests must be a whole number, at least 1"),
        ("max_requests = true", "key 1: max_requests must be"),
        ("tokens = 3", "key 1 may have tenant, sha256, name, operator and max_requests alone"),
        ("[tenants.a]\nmax_requests = 1.5", "tenants.a: max_requests must be"),
        ("[tenants.a]\nweight = 0", "tenants.a.weight must be a number from 0.001 to 1000"),
        ("[tenants.a]\nshare = 2", "tenants.a may have weight and max_requests alone"),
    ],
)
def test_a_file_of_keys_says_what_is_wrong_with_it(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f"[[keys]]\ntenant = 'a'\nsha256 = '{'0' * 64}'\n{line}\n")
    with pytest.raises(KeyFileError, match=re.escape(complaint)):
        KeyRing(file=file)


def test_tenants_share_no_session_and_no_response(shared: Shared) -> None:
    with shared.http("alice") as alice, shared.http("bob") as bob, shared.openai("bob") as client:
        answered = alice.post(CHAT, json=body(TEXT, slipstream={"session_id": "mine"})).json()
        assert answered["slipstream"]["session_id"] == "mine"
        stored = alice.post("/v1/responses", json={"input": TEXT, "max_output_tokens": 4}).json()
        assert [each["id"] for each in bob.get("/v1/sessions").json()["data"]] == []
        for verb, path in (("GET", ""), ("DELETE", ""), ("POST", "/fork"), ("POST", "/save"), ("POST", "/load")):
            request = {"json": {}} if verb == "POST" else {}
            assert bob.request(verb, f"/v1/sessions/mine{path}", **request).status_code == 404  # type: ignore[arg-type]
        with pytest.raises(NotFoundError):
            client.responses.retrieve(stored["id"])
        with pytest.raises(NotFoundError):
            client.responses.delete(stored["id"])
        with pytest.raises(NotFoundError):
            client.responses.create(model=MODEL, input="And?", previous_response_id=stored["id"])
        new = bob.post(CHAT, json=body("Hi", slipstream={"session_id": "mine"})).json()["slipstream"]
        assert new["reused_tokens"] == 0, "it's a session of his own"
        assert len(alice.get("/v1/sessions/mine").json()["messages"]) == 2


def test_tenants_share_no_kv_no_answer_and_no_token_ids(shared: Shared) -> None:
    said = body("A long sentence about quokkas, which both of them send to the letter. " * 8, max_tokens=8)
    hits = "slipstream_response_cache_hits_total"
    before = shared.server.metrics()[hits]
    with shared.http("erin") as erin, shared.http("frank") as frank:
        first, again = (erin.post(CHAT, json=said).json() for _ in range(2))
        assert again["slipstream"]["response_cache"] == "hit"
        stranger = frank.post(CHAT, json=said).json()
        assert stranger["slipstream"]["response_cache"] == "miss"
        assert stranger["slipstream"]["reused_tokens"] == 0
        assert stranger["choices"][0]["message"] == first["choices"][0]["message"], "the same, computed anew"
        # Known answers keep their token ids; a stranger's are tokenised like any text.
        answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
        odd = {"messages": [*said["messages"], answer, {"role": "user", "content": "Go on"}]}
        plain = frank.post("/tokenize", json=odd).json()
        assert plain["count"] > 0
        assert shared.server.metrics()[hits] == before + 1


def test_a_turn_costs_a_stranger_what_it_cost_whoever_was_first(shared: Shared) -> None:
    """In tokens, by every protocol, of text and of calls, also where the first one's KV is on disk."""
    said = [{"role": "user", "content": f"{TEXT}, one after the other, as they came down to the shore. " * 6}]
    tool = {"name": "count", "parameters": {"type": "object", "properties": {"birds": {"enum": [11, 12, 13]}}}}
    described = {"name": "count", "input_schema": tool["parameters"]}
    requests: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": said, "max_tokens": 8}),
        (CHAT, {"messages": said, "tools": [{"type": "function", "function": tool}], "tool_choice": "required"}),
        ("/v1/messages", {"messages": said, "tools": [described], "tool_choice": {"type": "any"}, "max_tokens": 40}),
        ("/v1/responses", {"input": said, "max_output_tokens": 8}),
        ("/v1/completions", {"prompt": said[0]["content"], "max_tokens": 8}),
    ]
    restored = "slipstream_state_restored_tokens_total"
    before = shared.server.metrics()[restored]
    with shared.http("iris") as iris, shared.http("jack") as jack:
        for path, request in requests:
            costs = []
            for http in (iris, jack):
                fresh = {"temperature": 0.0, **request, "slipstream": {"speculation": False}}
                report = http.post(path, json=fresh).raise_for_status().json()["slipstream"]
                names = ("prompt", "reused", "delta", "completion", "forced")
                costs.append({name: report[f"{name}_tokens"] for name in names} | {"cache": report["response_cache"]})
                wait_until(lambda: shared.server.metrics()["slipstream_state_unsaved_parts"] == 0)
            assert costs[0] == costs[1], path
        assert shared.server.metrics()[restored] == before


def test_a_conversation_that_another_began_is_counted_and_not_told(shared: Shared) -> None:
    kind = "slipstream_reuse_breaks_total other_tenant"
    messages = [{"role": "user", "content": f"{TEXT}, and this is what he wrote down at night. " * 4}]
    with shared.http("gina") as gina, shared.http("hank") as hank:
        for _ in range(2):
            answer = gina.post(CHAT, json=body(messages=messages)).json()["choices"][0]["message"]
            messages += [answer, {"role": "user", "content": "And then?"}]
        before = shared.server.metrics()[kind]
        report = hank.post(CHAT, json=body(messages=messages)).json()["slipstream"]
        assert (report["reused_tokens"], report["reuse_break"]) == (0, None)
        assert shared.server.metrics()[kind] == before + 1


def test_docs_work_offline_and_take_the_key_from_a_browser(shared: Shared) -> None:
    asked = httpx.get(f"{shared.server.url}/docs")
    assert asked.headers["www-authenticate"].startswith("Basic ")
    login = base64.b64encode(f"me:{shared.by_name['alice']}".encode()).decode()
    page = httpx.get(f"{shared.server.url}/docs", headers={"Authorization": f"Basic {login}"})
    assert page.status_code == 200
    assert "/v1/sessions/{id}/fork" in page.text
    assert not re.findall(r"<script|https?://|src=", page.text), "nothing is loaded from anywhere"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    other = httpx.get(f"{shared.server.url}/v1/models", headers={"Authorization": f"Basic {login}"})
    assert other.status_code == 401, "a browser would send it along with any page's request"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "169.254.1.1", "localhost.evil.example", ""])
def test_names_of_others_are_refused(server: Server, host: str) -> None:
    for path in ("/v1/sessions", "/health"):
        response = httpx.get(server.url + path, headers={"Host": host})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000", "app.localhost"])
def test_names_of_loopback_are_served(server: Server, host: str) -> None:
    assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_web_pages_of_other_origins_are_refused(server: Server, origin: str) -> None:
    for verb, path in (("GET", "/v1/sessions"), ("POST", CHAT), ("DELETE", "/v1/sessions/x"), ("OPTIONS", CHAT)):
        response = httpx.request(verb, server.url + path, headers={"Origin": origin, **JSON}, content="{}")
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
    assert httpx.get(server.url + "/v1/models", headers={"Origin": server.url}).status_code == 200


def test_nothing_happens_that_a_page_can_send_without_asking(server: Server, http: httpx.Client) -> None:
    """A form or a script without CORS can send such requests anywhere; their answers it can't read."""
    http.post("/v1/sessions", json={"id": "held", "messages": [{"role": "user", "content": "Hi"}]})
    kinds = [{}, *({"Content-Type": kind} for kind in ("text/plain", "application/x-www-form-urlencoded"))]
    for path in ("/v1/sessions/held/fork", "/v1/sessions/held/save", "/v1/sessions/held/load", CHAT, "/v1/responses"):
        for headers in kinds:
            response = http.post(path, headers=headers, content=b"" if "held" in path else b"{}")
            assert response.status_code == 400
            assert "Content-Type: application/json" in response.json()["error"]["message"]
    assert http.post("/v1/sessions/held/fork", headers=JSON).status_code == 201, "without a body, but as JSON"
    http.delete("/v1/sessions/held").raise_for_status()


def test_official_clients_go_on_working_without_bodies(server: Server, client: OpenAI) -> None:
    client.post("/sessions", body={"id": "plain"}, cast_to=object)
    client.post("/sessions/plain/fork", cast_to=object)
    client.delete("/sessions/plain", cast_to=object)
    response = client.responses.create(model=MODEL, input="Hi", max_output_tokens=4)
    client.responses.delete(response.id)
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as other:
        other.messages.create(model=MODEL, max_tokens=4, messages=[{"role": "user", "content": "Hi"}])


def test_a_server_behind_a_proxy_and_for_a_page(model: Model) -> None:
    page = "https://app.example"
    options = ("--allow-origin", page, "--allowed-host", "llm.example", "--root-path", "/llm")
    with running_server(*options, "--forwarded-allow-ips", "127.0.0.1") as server:
        asked = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
        preflight = httpx.options(server.url + CHAT, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        answered = httpx.post(server.url + CHAT, json=body(), headers={"Origin": page}, timeout=HANG)
        assert answered.status_code == 200
        assert answered.headers["access-control-allow-origin"] == page
        assert httpx.get(server.url + "/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
        named = {"Host": "llm.example"}
        for prefix in ("", "/llm"):  # some proxies take it off
            assert httpx.get(f"{server.url}{prefix}/v1/models", headers=named).status_code == 200
            error = httpx.post(f"{server.url}{prefix}/v1/messages", json={}, headers=named).json()
            assert error["type"] == "error", "the protocol is told by the path"
        assert httpx.get(f"{server.url}/llmx/v1/models", headers=named).status_code == 404
        assert 'href="/llm/openapi.json"' in httpx.get(f"{server.url}/llm/docs", headers=named).text
        own = {**named, "Origin": "https://llm.example"}
        forwarded = {**own, "X-Forwarded-Proto": "https"}
        assert httpx.get(f"{server.url}/llm/v1/models", headers=own).status_code == 403
        assert httpx.get(f"{server.url}/llm/v1/models", headers=forwarded).status_code == 200


def test_forwarded_headers_of_others_are_not_believed(server: Server) -> None:
    headers = {"Host": "localhost", "Origin": "https://localhost", "X-Forwarded-Proto": "https"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 403


def test_a_server_for_others_needs_keys(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slipstream", "serve", "--model", MODEL, "--port", "0", "--host", "0.0.0.0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ended.returncode == 1
    assert "--api-key" in " ".join(ended.stderr.split())
    assert "--insecure" in " ".join(ended.stderr.split())
    (tmp_path / "keys.toml").write_text("[[keys]]\ntenant = 'a'\nsha256 = 'ff'\n")
    command += ["--api-keys-file", str(tmp_path / "keys.toml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ended.returncode == 1
    assert "key 1 needs the key's sha256" in " ".join(ended.stderr.split())


def test_state_is_closed_to_other_users(shared: Shared) -> None:
    with shared.http("alice") as alice:
        alice.post(CHAT, json=body("Long enough to be saved. " * 8, slipstream={"session_id": "saved"}))
        wait_until(lambda: alice.get("/v1/sessions/saved").json()["saved_bytes"] > 0)
    for path in [shared.state, *shared.state.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def traces(folder: Path, *texts: str) -> list[str]:
    """The files that have one of the texts somewhere."""
    found = []
    for path in folder.rglob("*"):
        try:
            data = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:  # it was just removed
            continue
        found += [path.name for text in texts if text.encode() in data]
    return found


def test_what_is_deleted_leaves_the_disk_within_seconds(shared: Shared) -> None:
    def kv() -> set[Path]:
        return set((shared.state / "kv").glob("*.safetensors"))

    before = kv()
    secret, other = "The vault opens with xylophone", "Bring marmalade to the quay"
    with shared.http("alice") as alice:
        alice.post(CHAT, json=body(f"{secret}. " * 12, slipstream={"session_id": "gone"}))
        first = alice.post("/v1/responses", json={"input": f"{other}. " * 12, "max_output_tokens": 4}).json()
        went_on = {"input": "And?", "previous_response_id": first["id"], "max_output_tokens": 4}
        second = alice.post("/v1/responses", json=went_on).json()
        wait_until(lambda: len(kv() - before) >= 3)  # a part for each of the turns
        written = kv() - before
        assert traces(shared.state, secret)
        assert traces(shared.state, other)
        alice.delete("/v1/sessions/gone").raise_for_status()
        alice.delete(f"/v1/responses/{first['id']}").raise_for_status()
        alice.delete(f"/v1/responses/{second['id']}").raise_for_status()
        ids = {each["id"] for each in alice.get("/v1/sessions").json()["data"]}
        assert second["slipstream"]["session_id"] not in ids
    wait_until(lambda: not traces(shared.state, secret, other))
    wait_until(lambda: not written & kv())


def test_a_deleted_response_leaves_a_named_conversation_alone(shared: Shared) -> None:
    with shared.openai("bob") as client:
        conversation = client.conversations.create()
        stored = client.responses.create(model=MODEL, input="Hi", conversation=conversation.id, max_output_tokens=4)
        client.responses.delete(stored.id)
        assert client.conversations.retrieve(conversation.id).id == conversation.id
