"""Sessions over HTTP: named, extended, forked, rolled back, pinned and forgotten, and exact whatever was done."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from openai import OpenAI

from tests.server.process import MODEL, Server
from tests.server.test_errors import assert_error, function
from tests.short_model import TOKEN_BYTES
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
SESSIONS = "/v1/sessions"
SYSTEM = {"role": "system", "content": "You keep a list of things and answer in a few words."}
GREEDY = {"temperature": 0, "max_tokens": 12}
SEEDED = {"temperature": 0.9, "seed": 7, "max_tokens": 12}
LONG = "A tree, a house, a river and a road. " * 40


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def name() -> str:
    """Of a session that no other test has."""
    return f"test-{secrets.token_hex(6)}"


def chat(http: httpx.Client, *messages: Any, session: str | None = None, **params: Any) -> Any:
    """The response to a turn, of a session if one is named; greedy unless it says otherwise."""
    options = params.pop("slipstream", {}) | ({"session_id": session} if session else {})
    response = http.post(CHAT, json={"messages": messages, **GREEDY, **params, "slipstream": options})
    assert response.status_code == 200, response.text
    return response.json()


def said(response: Any) -> str:
    return str(response["choices"][0]["message"]["content"])


def afresh(http: httpx.Client, messages: list[Any], **params: Any) -> str:
    """What a whole conversation is answered when nothing that is known may be used."""
    return said(chat(http, *messages, **params, slipstream={"reuse": False}))


def create(http: httpx.Client, *messages: Any, **fields: Any) -> Any:
    response = http.post(SESSIONS, json={"messages": messages, **fields})
    assert response.status_code == 201, response.text
    return response.json()


def get(http: httpx.Client, name: str) -> Any:
    response = http.get(f"{SESSIONS}/{quote(name, safe='')}")
    assert response.status_code == 200, response.text
    return response.json()


def do(http: httpx.Client, name: str, action: str, **fields: Any) -> Any:
    """Append (`messages`), fork or roll back."""
    response = http.post(f"{SESSIONS}/{name}/{action}", json=fields)
    assert response.status_code in (200, 201), response.text
    return response.json()


def change(http: httpx.Client, name: str, **fields: Any) -> Any:
    response = http.patch(f"{SESSIONS}/{name}", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def wait_for_kv(http: httpx.Client, name: str, tokens: int) -> Any:
    """The session, once so many of its tokens have their KV."""
    wait_until(lambda: get(http, name)["kv_tokens"] >= tokens)
    return get(http, name)


@contextmanager
def busy(http: httpx.Client, name: str) -> Iterator[None]:
    """A turn of the session that is being answered as long as the context lasts; then its client goes away."""
    body = {"messages": [user("Go on and on.")], "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with http.stream("POST", CHAT, json=body, headers={"X-Session-Id": name}) as response:
        assert response.status_code == 200
        events = response.iter_lines()
        next(events)
        yield


def wait_until_free(http: httpx.Client, name: str) -> None:
    """Wait until no turn of the session is under way, or there is no such session."""
    wait_until(lambda: not http.get(f"{SESSIONS}/{name}").json().get("busy"))


# What there is to a session


def test_a_session_is_created_with_messages_tools_and_time_to_live(http: httpx.Client, name: str) -> None:
    tool = function("look_up", description="Look it up", parameters={"type": "object", "properties": {}})
    before = time.time()
    made = create(http, SYSTEM, user("A tree."), id=name, tools=[tool], ttl_seconds=500)
    assert made["id"] == name
    assert made["object"] == "session"
    assert (made["message_count"], made["pinned"], made["parent"], made["busy"]) == (2, False, None, False)
    assert made["ttl_seconds"] == 500
    assert before <= made["created_at"] <= made["last_used_at"] <= time.time()
    assert made["expires_at"] == pytest.approx(made["last_used_at"] + 500)
    whole = get(http, name)
    assert whole["messages"] == [SYSTEM, user("A tree.")]
    assert whole["tools"] == [tool]
    answer = chat(http, SYSTEM, user("A tree."), tools=[tool], tool_choice="none")
    assert made["tokens"] == answer["usage"]["prompt_tokens"]


def test_an_empty_session_gets_a_name_and_begins_with_its_first_turn(http: httpx.Client) -> None:
    made = create(http)
    assert made["id"].startswith("sess_")
    assert (made["message_count"], made["tokens"], made["kv_bytes"]) == (0, 0, 0)
    response = chat(http, user("A tree."), session=made["id"])
    assert response["slipstream"]["session_id"] == made["id"]
    assert get(http, made["id"])["messages"] == [user("A tree."), assistant(said(response))]


def test_every_conversation_is_a_session_by_the_id_that_its_answers_carry(http: httpx.Client) -> None:
    first = chat(http, SYSTEM, user(f"Remember {secrets.token_hex(4)}."))
    name = first["slipstream"]["session_id"]
    session = get(http, name)
    assert session["messages"][-1] == assistant(said(first))
    assert session["tokens"] == first["usage"]["total_tokens"]
    second = chat(http, user("And a river."), session=name)
    assert second["slipstream"]["reused_tokens"] >= first["usage"]["total_tokens"]
    assert get(http, name)["message_count"] == 5


def test_calls_and_results_are_told_in_the_form_in_which_they_are_sent(http: httpx.Client, name: str) -> None:
    tool = function("add", parameters={"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]})
    asked = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    (call,) = chat(http, user("Add."), session=name, **asked)["choices"][0]["message"]["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "added"}
    answer = chat(http, result, session=name, tool_choice="none")
    messages = get(http, name)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [call]
    assert messages[2] == result
    assert get(http, name)["tools"][0]["function"]["name"] == "add"
    assert said(answer) == afresh(http, messages[:3], tools=[tool], tool_choice="none")


def test_sizes_are_those_in_memory(server: Server, http: httpx.Client, name: str) -> None:
    create(http, user(LONG), id=name)
    session = wait_for_kv(http, name, get(http, name)["tokens"])
    assert session["kv_tokens"] == session["tokens"] > 400
    assert session["kv_bytes"] == session["kv_tokens"] * TOKEN_BYTES
    assert session["saved_bytes"] == 0


def test_the_list_begins_with_what_was_used_last(http: httpx.Client, name: str) -> None:
    names = [f"{name}-{index}" for index in range(5)]
    for each in names:
        create(http, user("A tree."), id=each)
    do(http, names[1], "messages", messages=[user("A house.")])
    do(http, names[2], "rollback", keep=0)
    chat(http, user("A river."), session=names[0])
    change(http, names[3], ttl_seconds=1000)
    listed = [session["id"] for session in http.get(SESSIONS).json()["data"]]
    assert listed[:5] == [names[index] for index in (3, 0, 2, 1, 4)]


def test_the_list_comes_in_pages(http: httpx.Client, name: str) -> None:
    for index in range(5):
        create(http, id=f"{name}-{index}")
    everything = http.get(SESSIONS, params={"limit": 1000}).json()
    assert everything["object"] == "list"
    assert everything["has_more"] is False
    assert not {"messages", "tools"} & set(everything["data"][0])
    names = [session["id"] for session in everything["data"]]
    pages, after = [], {}
    while True:
        page = http.get(SESSIONS, params={"limit": 2, **after}).json()
        pages += [session["id"] for session in page["data"]]
        after = {"after": pages[-1]}
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
    assert pages == names


# Names


def test_header_with_affinity_is_a_hint(http: httpx.Client, name: str) -> None:
    """opencode sends both with all requests, some of which overlap, and each time the whole conversation."""
    headers = {"X-Session-Id": name, "X-Session-Affinity": name}
    body = {"messages": [user("Count.")], "stream": True, "max_tokens": 900, "temperature": 0}
    with http.stream("POST", CHAT, json=body, headers=headers) as response:
        next(response.iter_lines())
        title = {"messages": [user("A title?")], "max_tokens": 2}
        assert http.post(CHAT, json=title, headers=headers).status_code == 200
        assert http.post(
            "/v1/responses", json={"input": "A title?", "max_output_tokens": 2}, headers=headers
        ).is_success


def test_body_goes_before_header_and_header_before_cache_key(client: OpenAI, http: httpx.Client, name: str) -> None:
    def asked(**params: Any) -> str:
        response: Any = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "A tree."}], max_tokens=4, **params
        )
        return str(response.slipstream["session_id"])

    body, header, key = ({"slipstream": {"session_id": f"{name}-body"}}, {"X-Session-Id": f"{name}-header"}, name)
    assert asked(extra_body=body, extra_headers=header, prompt_cache_key=key) == f"{name}-body"
    assert asked(extra_headers=header, prompt_cache_key=key) == f"{name}-header"
    assert asked(prompt_cache_key=key) == name
    counts = [get(http, each)["message_count"] for each in (f"{name}-body", f"{name}-header", name)]
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("odd", ["a?b#c", "100%25", "'\"<>&;", "..a..", "{id}", "\\", "~!@$^*()+=[]|:,`", "x" * 249])
def test_names_may_have_odd_characters(http: httpx.Client, name: str, odd: str) -> None:
    odd += name[-7:]
    chat(http, user("A tree."), session=odd, max_tokens=2)
    chat(http, user("A house."), session=odd, max_tokens=2)
    assert get(http, odd)["message_count"] == 4
    path = f"{SESSIONS}/{quote(odd, safe='')}"
    assert http.patch(path, json={"ttl_seconds": 9}).json()["ttl_seconds"] == 9
    assert http.delete(path).json() == {"id": odd, "object": "session.deleted", "deleted": True}
    assert http.get(path).status_code == 404


@pytest.mark.parametrize("bad", ["a b", "a/b", "", "é", "x" * 257])
def test_names_that_fit_in_no_path_are_refused(http: httpx.Client, bad: str) -> None:
    body = {"messages": [user("x")], "max_tokens": 2}
    response = http.post(CHAT, json={**body, "slipstream": {"session_id": bad}})
    assert_error(response, 400, "slipstream.session_id", "invalid_value", "match")
    response = http.post(CHAT, json=body, headers={"X-Session-Id": bad.encode()})
    assert_error(response, 400, "X-Session-Id", "invalid_value", "printable ASCII")
    assert_error(http.post(SESSIONS, json={"id": bad}), 400, "id", "invalid_value", "match")
    response = http.post(CHAT, json={**body, "prompt_cache_key": bad})  # no name was meant
    assert response.json()["slipstream"]["session_id"].startswith("conv_")


def test_a_shared_cache_key_shares_nothing_that_is_said(http: httpx.Client, name: str) -> None:
    secret = {"role": "system", "content": "The password is swordfish."}
    tool = function("open_safe", parameters={"type": "object", "properties": {}})
    chat(http, secret, user("A tree."), prompt_cache_key=name, tools=[tool], tool_choice="none")
    strangers: list[list[Any]] = [
        [user("A house.")],
        [user("A tree.")],
        [assistant("Welcome!"), user("A house.")],
        [{"role": "tool", "tool_call_id": "c", "content": "done"}],
        [SYSTEM, user("A house.")],
    ]
    for messages in strangers:
        response = chat(http, *messages, prompt_cache_key=name)
        alone = http.post("/tokenize", json={"messages": messages}).json()["count"]
        assert response["usage"]["prompt_tokens"] == alone
        assert said(response) == afresh(http, messages)
        session = get(http, name)
        assert session["messages"] == [*messages, assistant(said(response))]
        assert session["tools"] == []


def test_turns_with_a_shared_cache_key_do_not_wait_for_each_other(http: httpx.Client, name: str) -> None:
    body = {"messages": [user("Go on.")], "max_tokens": 3000, "ignore_eos": True, "prompt_cache_key": name}
    with http.stream("POST", CHAT, json={**body, "stream": True}) as response:
        events = response.iter_lines()
        next(events)
        chat(http, user("A tree."), prompt_cache_key=name)
        next(events)  # the first one still goes on


# Which messages a turn sends


def test_new_messages_alone_are_the_next_ones(http: httpx.Client, name: str) -> None:
    first = chat(http, SYSTEM, user("A tree."), session=name)
    second = chat(http, user("A house."), session=name)
    whole = [SYSTEM, user("A tree."), assistant(said(first)), user("A house.")]
    assert get(http, name)["messages"] == [*whole, assistant(said(second))]
    assert said(second) == afresh(http, whole)
    glue = "<|im_end|>\n<|im_start|>user\nA house.<|im_end|>\n<|im_start|>assistant\n"
    tail = http.post("/tokenize", json={"content": glue}).json()["count"]
    assert second["usage"]["prompt_tokens"] == first["usage"]["total_tokens"] + tail


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["without system", "with system"])
def test_a_whole_conversation_is_recognised_and_takes_the_place_of_what_was(
    http: httpx.Client, name: str, system: list[Any]
) -> None:
    first = chat(http, *system, user("A tree."), session=name)
    whole = [*system, user("A tree."), assistant(said(first)), user("A house.")]
    second = chat(http, *whole, session=name)
    assert second["slipstream"]["reused_tokens"] >= first["usage"]["total_tokens"]
    assert get(http, name)["messages"] == [*whole, assistant(said(second))]

    edited = [*system, user("A tree."), assistant("Noted."), user("A river.")]
    third = chat(http, *edited, session=name)
    assert said(third) == afresh(http, edited)
    assert get(http, name)["messages"] == [*edited, assistant(said(third))]


def test_a_whole_conversation_may_leave_out_the_system_message_of_its_session(http: httpx.Client, name: str) -> None:
    first = chat(http, SYSTEM, user("A tree."), session=name)
    chat(http, user("A tree."), assistant(said(first)), user("A house."), session=name)
    messages = get(http, name)["messages"]
    assert messages[:4] == [SYSTEM, user("A tree."), assistant(said(first)), user("A house.")]
    assert len(messages) == 5


def test_another_system_message_begins_a_conversation_anew(http: httpx.Client, name: str) -> None:
    chat(http, SYSTEM, user("A tree."), session=name)
    other = [{"role": "system", "content": "You are a parrot."}, user("A house.")]
    response = chat(http, *other, session=name)
    assert said(response) == afresh(http, other)
    assert get(http, name)["messages"] == [*other, assistant(said(response))]


def test_no_messages_ask_for_an_answer_to_what_was_appended(http: httpx.Client, name: str) -> None:
    create(http, SYSTEM, id=name)
    do(http, name, "messages", messages=[user("A tree.")])
    answer = chat(http, session=name)
    assert said(answer) == afresh(http, [SYSTEM, user("A tree.")])
    assert get(http, name)["message_count"] == 3


def test_tools_stay_until_others_are_sent(http: httpx.Client, name: str) -> None:
    def kept() -> list[str]:
        return [tool["function"]["name"] for tool in get(http, name)["tools"]]

    one, other = function("one"), function("other")
    chat(http, user("A tree."), session=name, tools=[one], tool_choice="none")
    second = chat(http, user("A house."), session=name, tool_choice="none")
    assert kept() == ["one"]
    assert said(second) == afresh(http, get(http, name)["messages"][:-1], tools=[one], tool_choice="none")
    chat(http, user("A river."), session=name, tools=[other], tool_choice="none")
    assert kept() == ["other"]


def test_a_session_goes_on_in_any_protocol(http: httpx.Client, name: str) -> None:
    headers = {"X-Session-Id": name}
    first = chat(http, SYSTEM, user("A tree."), session=name)
    anthropic = http.post(
        "/v1/messages",
        json={"max_tokens": 6, "temperature": 0, "messages": [user("A house.")]},
        headers=headers,
    ).json()
    responses = http.post(
        "/v1/responses",
        json={"max_output_tokens": 16, "temperature": 0, "input": "A river."},
        headers=headers,
    ).json()
    assert anthropic["slipstream"]["session_id"] == responses["slipstream"]["session_id"] == name
    messages = get(http, name)["messages"]
    second, third = anthropic["content"][0]["text"], responses["output"][0]["content"][0]["text"]
    assert messages[:3] == [SYSTEM, user("A tree."), assistant(said(first))]
    assert messages[3:] == [user("A house."), assistant(second), user("A river."), assistant(third)]
    assert second == afresh(http, messages[:4], max_tokens=6)
    assert third == afresh(http, messages[:6], max_tokens=16)


def test_streamed_turns_are_turns(client: OpenAI, http: httpx.Client, name: str) -> None:
    def stream(text: str) -> str:
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": text}],
            stream=True,
            temperature=0,
            max_tokens=8,
            extra_headers={"X-Session-Id": name},
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    first, second = stream("A tree."), stream("A house.")
    assert get(http, name)["messages"] == [user("A tree."), assistant(first), user("A house."), assistant(second)]


# What may be done with a session


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_fork_at_any_message_answers_like_the_whole(http: httpx.Client, name: str, params: dict[str, Any]) -> None:
    chat(http, SYSTEM, user("A tree."), session=name, **params)
    chat(http, user("A house."), session=name, **params)
    original = get(http, name)["messages"]
    for keep in range(1, 6):
        fork = do(http, name, "fork", keep=keep)
        assert (fork["parent"], fork["message_count"]) == (name, keep)
        answer = chat(http, user("A river."), session=fork["id"], **params)
        assert said(answer) == afresh(http, [*original[:keep], user("A river.")], **params)
        assert get(http, fork["id"])["messages"][:keep] == original[:keep]
    assert get(http, name)["messages"] == original


def test_a_fork_shares_the_memory_of_what_it_keeps(server: Server, http: httpx.Client, name: str) -> None:
    first = chat(http, user(LONG), session=name)
    fork = do(http, name, "fork", id=f"{name}-fork")
    assert fork["kv_tokens"] >= first["usage"]["total_tokens"]
    before = server.wait_until_idle()["slipstream_kv_free_tokens"]
    answer = chat(http, user("A house."), session=f"{name}-fork")
    assert answer["slipstream"]["delta_tokens"] < 20
    assert before - server.metrics()["slipstream_kv_free_tokens"] < 200


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_after_a_rollback_the_answer_is_that_of_the_rest(http: httpx.Client, name: str, params: dict[str, Any]) -> None:
    for text in ("A tree.", "A house.", "A river."):
        chat(http, user(text), session=name, **params)
    messages = get(http, name)["messages"]
    for keep in (5, 4, 2, 1, 0):
        back = do(http, name, "rollback", keep=keep)
        assert back["message_count"] == keep
        answer = chat(http, user("A road."), session=name, **params)
        assert said(answer) == afresh(http, [*messages[:keep], user("A road.")], **params)
        do(http, name, "rollback", keep=keep)
        assert get(http, name)["messages"] == messages[:keep]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_what_was_appended_is_answered_like_the_whole(http: httpx.Client, name: str, params: dict[str, Any]) -> None:
    first = chat(http, SYSTEM, user("A tree."), session=name, **params)
    extended = do(http, name, "messages", messages=[user("A house."), assistant("A house, noted.")])
    assert extended["message_count"] == 5
    whole = [SYSTEM, user("A tree."), assistant(said(first)), user("A house."), assistant("A house, noted.")]
    answer = chat(http, user("A river."), session=name, **params)
    assert said(answer) == afresh(http, [*whole, user("A river.")], **params)
    assert get(http, name)["messages"] == [*whole, user("A river."), assistant(said(answer))]


def test_what_was_appended_is_computed_while_nobody_waits(server: Server, http: httpx.Client, name: str) -> None:
    chat(http, SYSTEM, user("A tree."), session=name)
    before = server.wait_until_idle()["slipstream_idle_tokens_total"]
    appended = do(http, name, "messages", messages=[user(LONG)])
    wait_for_kv(http, name, appended["tokens"])
    after = server.metrics()
    assert after["slipstream_idle_tokens_total"] - before >= 400
    answer = chat(http, session=name)
    assert answer["slipstream"]["delta_tokens"] == 1  # the last token is always computed, for its logits
    used = server.metrics()["slipstream_idle_tokens_used_total"] - after["slipstream_idle_tokens_used_total"]
    assert used >= 400


def test_a_new_session_is_computed_while_nobody_waits(http: httpx.Client, name: str) -> None:
    made = create(http, {"role": "system", "content": f"{name} {LONG}"}, id=name)
    wait_for_kv(http, name, made["tokens"])
    assert chat(http, user("A tree."), session=name)["slipstream"]["delta_tokens"] < 30


def test_pinned_sessions_stay_when_memory_is_short(server: Server, http: httpx.Client, name: str) -> None:
    pinned_before = server.wait_until_idle()["slipstream_kv_sequences pinned"]
    made = create(http, user(LONG), id=name, pinned=True)
    assert made["pinned"]
    assert made["expires_at"] is None
    tokens = wait_for_kv(http, name, made["tokens"])["tokens"]
    server.wait_for(lambda metrics: metrics["slipstream_kv_sequences pinned"] == pinned_before + 1)
    evicted = server.metrics()["slipstream_kv_evictions_total"]
    for index in range(4):  # together more than the memory has room for
        chat(http, user(f"{name} {index} " + "word " * 3000), max_tokens=1)
    assert server.metrics()["slipstream_kv_evictions_total"] > evicted
    assert get(http, name)["kv_tokens"] == tokens

    unpinned = change(http, name, pinned=False)
    assert not unpinned["pinned"]
    assert unpinned["expires_at"] == pytest.approx(time.time() + unpinned["ttl_seconds"], abs=5)
    server.wait_for(lambda metrics: metrics["slipstream_kv_sequences pinned"] == pinned_before)


def test_deleting_a_session_frees_what_it_alone_holds(server: Server, http: httpx.Client, name: str) -> None:
    chat(http, user(name + LONG), session=name)
    wait_for_kv(http, name, get(http, name)["tokens"])
    before = server.wait_until_settled()["slipstream_kv_free_tokens"]
    assert http.delete(f"{SESSIONS}/{name}").json() == {"id": name, "object": "session.deleted", "deleted": True}
    assert server.metrics()["slipstream_kv_free_tokens"] - before > 400
    assert_error(http.get(f"{SESSIONS}/{name}"), 404, "session_id", "session_not_found", name)


def test_sessions_that_nobody_uses_are_forgotten(http: httpx.Client, name: str) -> None:
    create(http, user("A tree."), id=f"{name}-pinned", ttl_seconds=2, pinned=True)
    used = create(http, user("A tree."), id=f"{name}-used", ttl_seconds=10_000)
    create(http, user("A tree."), id=f"{name}-gone", ttl_seconds=2)
    create(http, user("A tree."), id=f"{name}-changed", ttl_seconds=10_000)
    change(http, f"{name}-changed", ttl_seconds=2)
    for suffix in ("gone", "changed"):
        wait_until(lambda gone=f"{SESSIONS}/{name}-{suffix}": http.get(gone).status_code == 404)
    get(http, f"{name}-pinned")
    assert do(http, f"{name}-used", "rollback", keep=0)["expires_at"] > used["expires_at"]
    change(http, f"{name}-pinned", pinned=False)


# One turn at a time


def test_a_second_turn_meanwhile_is_refused_and_told_to_come_back(http: httpx.Client, name: str) -> None:
    create(http, user("A tree."), assistant("Noted."), id=name)
    with busy(http, name):
        assert get(http, name)["busy"]
        refused = [
            http.post(CHAT, json={"messages": [user("x")], "slipstream": {"session_id": name}}),
            http.post(CHAT, json={"messages": [user("x")], "stream": True}, headers={"X-Session-Id": name}),
            http.post("/v1/responses", json={"input": "x"}, headers={"X-Session-Id": name}),
            http.post(f"{SESSIONS}/{name}/messages", json={"messages": [user("x")]}),
            http.post(f"{SESSIONS}/{name}/rollback", json={"keep": 0}),
            http.delete(f"{SESSIONS}/{name}"),
        ]
        for response in refused:
            assert_error(response, 409, None, "session_conflict", "fork")
            assert response.headers["Retry-After"] == "1"
        body = {"max_tokens": 4, "messages": [user("x")]}
        response = http.post("/v1/messages", json=body, headers={"X-Session-Id": name})
        assert response.status_code == 409
        assert response.json()["error"]["details"] == {"error_code": "session_conflict"}
        assert do(http, name, "fork")["message_count"] == 2
    wait_until_free(http, name)


def test_a_session_whose_client_went_away_is_as_it_was(http: httpx.Client, name: str) -> None:
    create(http, user("A tree."), assistant("Noted."), id=name)
    with busy(http, name):
        pass
    wait_until_free(http, name)
    assert get(http, name)["messages"] == [user("A tree."), assistant("Noted.")]
    answer = chat(http, user("A house."), session=name)
    assert said(answer) == afresh(http, [user("A tree."), assistant("Noted."), user("A house.")])


def test_a_first_turn_that_is_never_answered_leaves_no_session(http: httpx.Client, name: str) -> None:
    with busy(http, name):
        assert http.get(f"{SESSIONS}/{name}").status_code == 404
        assert name not in [session["id"] for session in http.get(SESSIONS).json()["data"]]
        response = http.post(SESSIONS, json={"id": name})
        assert response.status_code == 409
    wait_until(lambda: http.post(SESSIONS, json={"id": name}).status_code != 409)
    assert get(http, name)["message_count"] == 0


BAD_TOOL = function(
    parameters={"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}, strict=True
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [user("word " * 9000)]},
        {"max_tokens": 10**6},
        {"tools": [BAD_TOOL], "tool_choice": "required"},
        {"model": "another"},
        {"logit_bias": {"9999999": 1}},
        {"n": 129},
        {"messages": [{"role": "nobody"}]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_request_that_fails_leaves_its_session_as_it_was(
    http: httpx.Client, name: str, wrong: dict[str, Any]
) -> None:
    body = {"messages": [user("A house.")], "max_tokens": 4, "slipstream": {"session_id": name}, **wrong}
    assert http.post(CHAT, json=body).status_code in (400, 404)
    assert http.get(f"{SESSIONS}/{name}").status_code == 404
    chat(http, user("A tree."), session=name)
    kept = get(http, name)
    assert http.post(CHAT, json=body).status_code in (400, 404)
    after = get(http, name)
    assert (after["messages"], after["tools"], after["busy"]) == (kept["messages"], kept["tools"], False)


def test_a_refused_append_changes_nothing(http: httpx.Client, name: str) -> None:
    create(http, user("A tree."), id=name)
    response = http.post(f"{SESSIONS}/{name}/messages", json={"messages": [user("word " * 9000)]})
    assert_error(response, 400, "messages", "context_length_exceeded", "append less")
    assert get(http, name)["messages"] == [user("A tree.")]


# What goes wrong


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH", "POST messages", "POST fork", "POST rollback"])
def test_a_session_that_is_not_there(http: httpx.Client, method: str) -> None:
    verb, _, action = method.partition(" ")
    body = {"messages": {"messages": [user("x")]}, "rollback": {"keep": 0}}.get(action, {})
    content = json.dumps(body) if verb in ("PATCH", "POST") else None
    path = f"{SESSIONS}/nobody" + (f"/{action}" if action else "")
    response = http.request(verb, path, content=content, headers={"Content-Type": "application/json"})
    assert_error(response, 404, "session_id", "session_not_found", "'nobody'")


def test_a_page_after_a_session_that_is_not_there(http: httpx.Client) -> None:
    response = http.get(SESSIONS, params={"after": "nobody"})
    assert_error(response, 404, "session_id", "session_not_found", "'nobody'")


def test_a_name_that_is_taken(http: httpx.Client, name: str) -> None:
    create(http, id=name)
    assert_error(http.post(SESSIONS, json={"id": name}), 409, None, "session_conflict", "choose another id")
    response = http.post(f"{SESSIONS}/{name}/fork", json={"id": name})
    assert_error(response, 409, None, "session_conflict", "choose another id")


@pytest.mark.parametrize("action", ["save", "load"])
def test_without_a_state_dir_nothing_is_on_disk(http: httpx.Client, name: str, action: str) -> None:
    create(http, id=name)
    response = http.post(f"{SESSIONS}/{name}/{action}", json={})
    assert_error(response, 400, None, "no_state_dir", "--state-dir")


@pytest.mark.parametrize(
    ("action", "body", "param", "code", "says"),
    [
        ("", {"idd": "x"}, "idd", "unknown_parameter", "leave it out"),
        ("", {"ttl_seconds": 0}, "ttl_seconds", "invalid_value", "greater than 0"),
        ("", {"ttl_seconds": float("inf")}, "ttl_seconds", "invalid_value", "finite"),
        ("", {"ttl_seconds": "soon"}, "ttl_seconds", "invalid_value", "number"),
        ("", {"pinned": "very"}, "pinned", "invalid_value", "boolean"),
        ("", {"messages": [{"role": "usr"}]}, "messages[0].role", "invalid_value", "'user'"),
        ("", {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "required"),
        ("", {"messages": [user("word " * 9000)]}, "messages", "context_length_exceeded", "8,192"),
        ("", {"tools": [{"type": "web"}]}, "tools[0].type", "invalid_value", "'function'"),
        ("/messages", {}, "messages", "missing_required_parameter", "required"),
        ("/messages", {"messages": []}, "messages", "invalid_value", "at least 1"),
        ("/messages", {"messages": [user("x")], "tools": []}, "tools", "unknown_parameter", "leave it out"),
        ("/rollback", {}, "keep", "missing_required_parameter", "required"),
        ("/rollback", {"keep": 3}, "keep", "invalid_value", "0 to 2"),
        ("/rollback", {"keep": -1}, "keep", "invalid_value", "0"),
        ("/rollback", {"keep": False}, "keep", "invalid_value", "integer"),
        ("/fork", {"keep": 3}, "keep", "invalid_value", "0 to 2"),
        ("/fork", {"keep": False}, "keep", "invalid_value", "integer"),
        ("", {"ttl_seconds": True}, "ttl_seconds", "invalid_value", "number"),
        ("/fork", {"id": "a/b"}, "id", "invalid_value", "match"),
    ],
)
def test_bad_field(http: httpx.Client, name: str, action: str, body: Any, param: str, code: str, says: str) -> None:
    if action:
        create(http, SYSTEM, user("A tree."), id=name)
    path = f"{SESSIONS}/{name}{action}" if action else SESSIONS
    response = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert_error(response, 400, param, code, says)


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 1001}, {"limit": "all"}])
def test_bad_limit(http: httpx.Client, query: dict[str, Any]) -> None:
    assert_error(http.get(SESSIONS, params=query), 400, "limit", "invalid_value", "limit")


# Whose session it is


def test_conversations_that_part_cannot_be_continued_by_the_id_that_nobody_chose(http: httpx.Client, name: str) -> None:
    beginning = [SYSTEM, user(f"We are strangers: {name}.")]
    first = chat(http, *beginning)
    common = [*beginning, assistant(said(first))]
    shared = first["slipstream"]["session_id"]
    assert chat(http, *common, user("I am the first."))["slipstream"]["session_id"] == shared
    chat(http, *common, user("I am the second, and my secret is B."))
    response = http.post(CHAT, json={"messages": [user("Go on.")], **GREEDY, "slipstream": {"session_id": shared}})
    assert_error(response, 400, "session_id", "session_shared", "several conversations")
    whole = chat(http, *common, user("I am the first."), assistant("Fine."), user("Go on."), session=shared)
    assert said(whole) == afresh(http, [*common, user("I am the first."), assistant("Fine."), user("Go on.")])


def test_a_named_session_is_moved_by_nobody_who_does_not_name_it(http: httpx.Client, name: str) -> None:
    mine = [SYSTEM, user(f"This is mine: {name}.")]
    answer = said(chat(http, *mine, session=name))
    before = get(http, name)["messages"]
    stranger = chat(http, *mine, assistant(answer), user("I only say the same."))
    hinted = chat(http, SYSTEM, user("I only took the same key."), prompt_cache_key=name)
    assert name not in (stranger["slipstream"]["session_id"], hinted["slipstream"]["session_id"])
    assert get(http, name)["messages"] == before
    going_on = chat(http, *mine, assistant(answer), user("It is me."), prompt_cache_key=name)
    assert going_on["slipstream"]["session_id"] == name
    assert len(get(http, name)["messages"]) == 5


def test_of_several_choices_the_first_becomes_the_session(http: httpx.Client, name: str) -> None:
    response = chat(http, SYSTEM, user("Say anything."), session=name, n=3, temperature=1, seed=3)
    assert get(http, name)["messages"][-1] == assistant(said(response))
    other = response["choices"][2]["message"]["content"]
    following = chat(http, SYSTEM, user("Say anything."), assistant(other), user("And now?"), session=name)
    assert following["slipstream"]["delta_tokens"] < 20, "the other choices are known too"


NOTE = {
    "type": "function",
    "function": {"name": "note", "parameters": {"properties": {"text": {"enum": ["a", "b"]}}, "required": ["text"]}},
}


def test_a_call_may_be_asked_for_with_the_tools_of_the_session(http: httpx.Client, name: str) -> None:
    create(http, SYSTEM, id=name, tools=[NOTE])
    response = chat(http, user("Note something."), session=name, tool_choice="required", max_tokens=60)
    assert response["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "note"


def test_the_command_lists_what_the_server_remembers(server: Server, http: httpx.Client, name: str) -> None:
    create(http, SYSTEM, user("Remember me."), id=name, pinned=True)
    do(http, name, "fork", id=f"{name}-fork")
    command = [sys.executable, "-m", "slipstream", "sessions", "--url", server.url]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "160"})
    (row,) = [line for line in listed.stdout.splitlines() if f"{name}-fork" in line]
    assert name in row.replace(f"{name}-fork", "")
    http.patch(f"{SESSIONS}/{name}", json={"pinned": False}).raise_for_status()


def test_the_command_says_where_it_found_no_server() -> None:
    command = [sys.executable, "-m", "slipstream", "sessions", "--url", "http://127.0.0.1:9"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "no answer from http://127.0.0.1:9" in failed.stderr
