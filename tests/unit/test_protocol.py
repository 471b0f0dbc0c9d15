"""Requests read strictly: what is not obeyed is refused by name."""

from __future__ import annotations

import json

import pytest

from tuneloop.serving.protocol import (
    DEFAULT_NEW_TOKENS,
    ChunkWriter,
    Sampling,
    chat_identity,
    chat_usage,
    new_tokens,
    read_chat,
    read_score,
    score_body,
)
from tuneloop.serving.wire import Refused, error_body, read_object, request_id

HELLO = [{"role": "user", "content": "Hello"}]
ANSWERED = [*HELLO, {"role": "assistant", "content": "Hi."}]


def refused(read, body) -> Refused:
    with pytest.raises(Refused) as caught:
        read(body)
    return caught.value


# ---------------------------------------------------------------- OpenAI


def test_a_chat_request_is_read_whole():
    call = read_chat(
        {
            "model": "demo",
            "messages": [{"role": "developer", "content": "Be brief."}, *HELLO],
            "max_completion_tokens": 8,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 7,
            "stop": "\n",
            "n": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": "me",
            "metadata": {"a": "b"},
        }
    )
    assert call.messages[0] == {"role": "system", "content": "Be brief."}
    assert call.sampling == Sampling(8, 0.5, 0.9, 7, ("\n",))
    assert call.is_stream
    assert call.includes_usage


def test_null_means_not_given():
    call = read_chat({"messages": HELLO, "max_tokens": None, "tools": None, "stream": None, "logprobs": None})
    assert call.sampling == Sampling()


def test_values_that_ask_for_nothing_are_accepted():
    read_chat(
        {
            "messages": HELLO,
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logprobs": False,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
        }
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("n", 2),
        ("presence_penalty", 0.5),
        ("logit_bias", {"1": 5}),
        ("top_k", 40),
        ("reasoning_effort", "high"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value):
    error = refused(read_chat, {"messages": HELLO, field: value})
    assert (error.status, error.code, error.param) == (400, "unsupported", field)
    assert field in error.message


def test_a_misspelt_field_is_answered_with_the_nearest():
    assert "Did you mean 'temperature'?" in refused(read_chat, {"messages": HELLO, "temprature": 1}).message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("seed", "x"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", "Hello"),
    ],
)
def test_a_value_that_cannot_be_obeyed_is_named(field, value):
    error = refused(read_chat, {"messages": HELLO, field: value})
    assert (error.status, error.code, error.param) == (400, "invalid_value", field)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("Hello", "messages[0]"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": ""}, "messages[0].content"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": "x", "name": "Ann"}, "messages[0].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
    ],
)
def test_a_message_that_cannot_be_obeyed_is_named(message, param):
    assert refused(read_chat, {"messages": [message]}).param == param


def test_text_parts_are_put_together():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert read_chat({"messages": [{"role": "user", "content": parts}]}).messages == HELLO


def test_two_different_limits_are_refused():
    body = {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}
    assert refused(read_chat, body).param == "max_completion_tokens"
    assert read_chat({**body, "max_tokens": 6}).sampling.max_new_tokens == 6


def test_a_stream_ends_with_finish_reason_usage_and_done():
    writer = ChunkWriter(chat_identity("1", "m:1"), includes_usage=True)
    text = (writer.opening() + writer.content("é") + writer.closing("stop", chat_usage(3, 2))).decode()
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert [chunk["choices"][0]["delta"] if chunk["choices"] else None for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "é"},
        {},
        None,
    ]
    assert chunks[2]["choices"][0]["finish_reason"] == "stop"
    assert [chunk["usage"] for chunk in chunks] == [None, None, None, chat_usage(3, 2)]


# ---------------------------------------------------------------- /score


def score(conversations, **parameters):
    return {"input_data": {"input_string": conversations, "parameters": parameters}}


def test_the_notebooks_request_is_read():
    parameters = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 200}
    call = read_score({**score([HELLO], **parameters), "params": {}})
    assert call.conversations == [HELLO]
    assert call.sampling == Sampling(200, 0.6, 0.9)
    assert call.warnings == ()


def test_nested_and_flat_are_the_same_conversation():
    assert read_score(score(HELLO)) == read_score(score([HELLO]))


def test_several_conversations_keep_their_order():
    other = [{"role": "user", "content": "Bye"}]
    assert read_score(score([HELLO, other])).conversations == [HELLO, other]


@pytest.mark.parametrize("conversation", [ANSWERED, [ANSWERED]])
def test_a_trailing_assistant_turn_is_taken_off_and_said(conversation):
    call = read_score(score(conversation))
    assert call.conversations == [HELLO]
    assert "assistant turn" in call.warnings[0]


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [({}, 0.0), ({"do_sample": False}, 0.0), ({"temperature": 0.6}, 0.6), ({"do_sample": True}, None)],
)
def test_do_sample_decides_whether_replies_are_greedy(parameters, temperature):
    assert read_score(score(HELLO, **parameters)).sampling.temperature == temperature


def test_a_temperature_without_sampling_is_warned_of():
    call = read_score(score(HELLO, do_sample=False, temperature=0.6))
    assert call.sampling.temperature == 0.0
    assert call.warnings == ("do_sample is false, so temperature had no effect",)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input_data"),
        ({"input_data": {}}, "input_data.input_string"),
        ({"input_data": {"columns": ["a"]}}, "input_data.columns"),
        ({**score(HELLO), "params": {"temperature": 1}}, "params"),
        (score(HELLO, num_beams=4), "input_data.parameters.num_beams"),
        (score([[]]), "input_data.input_string[0]"),
        (score([ANSWERED[1:]]), "input_data.input_string[0]"),
        (score([HELLO, "x"]), "input_data.input_string[1]"),
        (score([HELLO] * 65), "input_data.input_string"),
    ],
)
def test_a_score_request_that_cannot_be_obeyed_is_named(body, param):
    assert refused(read_score, body).param == param


def test_one_reply_is_a_text_and_several_are_a_list():
    assert score_body(["a"]) == {"output": "a"}
    assert score_body(["a", "b"]) == {"output": ["a", "b"]}


# ---------------------------------------------------------------- both


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers():
    with pytest.raises(Refused, match=r"300 tokens.*256") as caught:
        new_tokens(Sampling(), 300, 256)
    assert caught.value.code == "context_length_exceeded"


def test_a_reply_that_does_not_fit_is_refused_with_what_would():
    with pytest.raises(Refused, match="at most 56"):
        new_tokens(Sampling(57), 200, 256)
    assert new_tokens(Sampling(56), 200, 256) == 56


def test_a_limit_left_out_is_the_default_or_what_the_context_leaves():
    assert new_tokens(Sampling(), 10, 8192) == DEFAULT_NEW_TOKENS
    assert new_tokens(Sampling(), 200, 256) == 56


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe", b'{"a": Infinity}'])
def test_a_body_that_is_no_json_object_is_refused(body):
    assert refused(read_object, body).code == "invalid_json"


def test_errors_have_the_shape_of_their_api():
    error = Refused(400, "invalid_value", "x: wrong", param="x")
    assert error_body("/score", error) == {"error": {"code": "invalid_value", "message": "x: wrong"}}
    assert error_body("/v1/chat/completions", error) == {
        "error": {
            "message": "x: wrong",
            "type": "invalid_request_error",
            "param": "x",
            "code": "invalid_value",
        }
    }


def test_a_request_id_is_kept_when_it_is_harmless():
    assert request_id("abc-1") == "abc-1"
    assert request_id("a\r\nb: c") != "a\r\nb: c"
    assert len(request_id(None)) == 32
