"""Conversion: every row exactly, or a finding that says why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneloop.core.data.convert import COLUMNS, KINDS, Conversion, Kind, detect, json_line
from tuneloop.core.data.rules import check_row, is_error
from tuneloop.core.errors import DataError, UsageError

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TURN = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip())
PAIRS = st.lists(st.tuples(TURN, TURN), min_size=1, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
COLUMN_NAMES = [name for kind in KINDS for name in (*COLUMNS[kind], "tools", "x")]


def messages(*pairs: tuple[str, str], system: str | None = None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*first, *turns]


def convert(kind: Kind, row: Mapping[str, Any], *mapped: str, **options: bool) -> dict[str, Any]:
    found = Conversion(kind, dict(each.split("=") for each in mapped), **options)(row)
    assert isinstance(found, dict), found
    return found


def refused(kind: Kind, row: Mapping[str, Any], *mapped: str, **options: bool) -> tuple[str, str]:
    """(rule, field) of the one finding."""
    found = Conversion(kind, dict(each.split("=") for each in mapped), **options)(row)
    assert isinstance(found, list), found
    assert len(found) == 1
    assert found[0].value
    assert found[0].fix
    return found[0].rule, found[0].field


# ---------------------------------------------------------------- there and back


@PATIENT
@given(PAIRS, st.none() | TURN)
def test_sharegpt_says_the_same_before_and_after(pairs: list[tuple[str, str]], system: str | None) -> None:
    turns = [{"from": "system", "value": system}] if system else []
    for asked, answered in pairs:
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    assert convert("sharegpt", {"conversations": turns})["messages"] == messages(*pairs, system=system)


@PATIENT
@given(PAIRS, st.none() | TURN)
def test_alpaca_says_the_same_before_and_after(pairs: list[tuple[str, str]], system: str | None) -> None:
    *history, (asked, answered) = pairs
    row = {"instruction": asked, "input": "", "output": answered, "history": [list(pair) for pair in history]}
    row |= {"system": system} if system else {}
    assert convert("alpaca", row) == {"messages": messages(*pairs, system=system)}


@PATIENT
@given(TURN, TURN)
def test_prompt_and_completion_say_the_same_before_and_after(asked: str, answered: str) -> None:
    row = {"prompt": asked, "completion": answered}
    assert convert("prompt-completion", row) == {"messages": messages((asked, answered))}


@PATIENT
@given(PAIRS, st.lists(st.sampled_from([None, 0, 1]), min_size=5, max_size=5))
def test_openai_says_the_same_before_and_after(
    pairs: list[tuple[str, str]], weights: list[int | None]
) -> None:
    written: list[dict[str, Any]] = [dict(message) for message in messages(*pairs)]
    for message, weight in zip(written[1::2], weights, strict=False):
        if weight is not None:
            message["weight"] = weight
    written[-1].pop("weight", None)
    assert convert("openai", {"messages": written}) == {"messages": written}


@PATIENT
@given(PAIRS)
def test_a_table_says_the_same_before_and_after(pairs: list[tuple[str, str]]) -> None:
    row, mapped = {}, []
    for number, pair in enumerate(pairs):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            row[f"{role}{number}"] = text
            mapped.append(f"{role}{number}={role}")
    assert convert("csv", row, *mapped) == {"messages": messages(*pairs)}


@PATIENT
@given(
    st.sampled_from(KINDS),
    st.dictionaries(
        st.sampled_from(COLUMN_NAMES),
        JSON
        | st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "tool"]), "content": JSON},
                optional={"weight": JSON},
            )
            | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "who"]), "value": JSON}),
            max_size=3,
        ),
    ),
)
def test_any_row_is_converted_to_one_that_can_be_learned_from_or_reported(
    kind: Kind, row: dict[str, Any]
) -> None:
    found = Conversion(kind)(row)
    if isinstance(found, dict):
        assert not [finding for finding in check_row(found) if is_error(finding)]
        assert json.loads(json_line(found)) == found
    else:
        assert found
        assert all(finding.rule and finding.fix for finding in found)


# ---------------------------------------------------------------- ShareGPT


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("system", "system"),
    ],
)
def test_speakers_that_sharegpt_files_use_are_known(speaker: str, role: str) -> None:
    turns = [{"from": speaker, "value": "a"}, {"from": "gpt", "value": "b"}]
    assert convert("sharegpt", {"conversations": turns})["messages"][0]["role"] == role


def test_a_speaker_can_be_named() -> None:
    turns = [{"from": "Alice", "value": "a"}, {"from": "Bob", "value": "b"}]
    row = {"conversations": turns}
    assert refused("sharegpt", row) == ("role_known", "conversations[0].from")
    assert convert("sharegpt", row, "Alice=user", "Bob=assistant")["messages"] == messages(("a", "b"))


def test_columns_and_keys_of_sharegpt_can_be_named() -> None:
    row = {"dialog": [{"who": "human", "text": "a"}, {"who": "gpt", "text": "b"}], "sys": "be brief"}
    named = ["dialog=conversations", "who=from", "text=value", "sys=system_prompt"]
    assert convert("sharegpt", row, *named) == {"messages": messages(("a", "b"), system="be brief")}


def test_a_system_column_stands_before_the_turns() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    found = convert("sharegpt", {"system": "s", "conversations": turns, "tools": "[]"})
    assert found == {"messages": messages(("a", "b"), system="s")}
    assert convert("sharegpt", {"system": "", "conversations": turns})["messages"] == messages(("a", "b"))


def test_turns_of_role_and_content_are_taken_too() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    found = convert("sharegpt", {"conversations": turns})
    assert found["messages"] == [
        *messages(("a", "b"))[:1],
        {"role": "assistant", "content": "b", "weight": 1},
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 1}, ("column_present", "conversations")),
        ({"conversations": "hello"}, ("turns_are_list", "conversations")),
        ({"conversations": []}, ("turns_are_list", "conversations")),
        ({"conversations": ["hello"]}, ("turn_is_object", "conversations[0]")),
        ({"conversations": [{"from": "gpt"}]}, ("content_is_text", "conversations[0].value")),
        ({"conversations": [{"from": "gpt", "value": " "}]}, ("content_not_empty", "conversations[0].value")),
        ({"conversations": [{"from": 7, "value": "a"}]}, ("role_known", "conversations[0].from")),
        (
            {"conversations": [{"from": "observation", "value": "a"}]},
            ("tools_unsupported", "conversations[0].from"),
        ),
        (
            {"conversations": [{"from": "gpt", "value": "a", "tool_calls": [1]}]},
            ("tools_unsupported", "conversations[0].tool_calls"),
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}], "tools": "[{}]"}, ("tools_unsupported", "tools")),
        ({"conversations": [{"from": "human", "value": "a"}]}, ("assistant_turn", "messages")),
        ({"conversations": [{"from": "gpt", "value": "a"}], "messages": 1}, ("messages_free", "messages")),
        (
            {"conversations": [{"from": "gpt", "value": "\ud800"}]},
            ("content_is_unicode", "messages[0].content"),
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}], "system": ["s"]}, ("content_is_text", "system")),
    ],
)
def test_what_is_wrong_with_a_sharegpt_row_is_said(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert refused("sharegpt", row) == expected


def test_what_a_turn_says_besides_is_dropped_and_counted() -> None:
    conversion = Conversion("sharegpt")
    turns = [
        {"from": "human", "value": "a", "markdown": None},
        {"from": "gpt", "value": "b", "markdown": "c"},
    ]
    assert conversion({"conversations": turns})
    assert conversion.notes == {"key 'markdown' of a turn dropped": 1}


def test_a_row_that_is_refused_leaves_no_notes() -> None:
    conversion = Conversion("sharegpt")
    conversion({"conversations": [{"from": "human", "value": "a", "x": 1}, {"from": "who", "value": "b"}]})
    conversion({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    assert conversion.notes == {}


# ---------------------------------------------------------------- Alpaca


def test_input_follows_instruction_on_a_new_line() -> None:
    conversion = Conversion("alpaca")
    found = conversion({"instruction": "Translate.", "input": "Hallo", "output": "Hello"})
    assert found == {"messages": messages(("Translate.\nHallo", "Hello"))}
    assert conversion.notes == {"instruction and input joined by a line break": 1}


def test_an_empty_instruction_leaves_the_input_alone() -> None:
    row = {"instruction": "", "input": "Hallo", "output": "Hello"}
    assert convert("alpaca", row) == {"messages": messages(("Hallo", "Hello"))}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"output": "a"}, ("column_present", "instruction")),
        ({"instruction": " ", "output": "a"}, ("content_not_empty", "instruction")),
        ({"instruction": "q"}, ("column_present", "output")),
        ({"instruction": "q", "output": ""}, ("content_not_empty", "output")),
        ({"instruction": 3, "output": "a"}, ("content_is_text", "instruction")),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, ("history_of_pairs", "history[0]")),
        ({"instruction": "q", "output": "a", "history": "x"}, ("history_of_pairs", "history[0]")),
        ({"instruction": "q", "output": "a", "history": [["x", ""]]}, ("content_not_empty", "history[0][1]")),
    ],
)
def test_what_is_wrong_with_an_alpaca_row_is_said(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert refused("alpaca", row) == expected


# ---------------------------------------------------------------- prompt and completion


def test_other_names_of_prompt_and_completion_can_be_named() -> None:
    row = {"question": "q", "answer": "a", "lang": "en"}
    found = convert("prompt-completion", row, "question=prompt", "answer=completion")
    assert found == {"messages": messages(("q", "a")), "lang": "en"}


def test_a_prompt_of_messages_is_read_and_not_learned() -> None:
    row = {"prompt": messages(("a", "b")) + messages(("c", "d"))[:1], "completion": messages(("c", "d"))[1:]}
    found = convert("prompt-completion", row)["messages"]
    assert [message.get("weight") for message in found] == [None, 0, None, None]
    assert [message["content"] for message in found] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q"}, ("column_present", "completion")),
        ({"prompt": "q", "completion": None}, ("content_is_text", "completion")),
        ({"prompt": "q", "completion": messages(("a", "b"))}, ("content_is_text", "completion[0]")),
        (
            {"prompt": messages(("a", "b")), "completion": [{"role": "tool", "content": "x"}]},
            ("tools_unsupported", "completion[0].role"),
        ),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert refused("prompt-completion", row) == expected


# ---------------------------------------------------------------- OpenAI


def openai(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **changes}]}


def test_developer_is_system_and_it_is_said() -> None:
    conversion = Conversion("openai")
    row = {"messages": [{"role": "developer", "content": "s"}, *messages(("a", "b"))]}
    assert conversion(row) == {"messages": messages(("a", "b"), system="s")}
    assert conversion.notes == {"role 'developer' written as 'system'": 1}


def test_parts_of_a_text_are_joined_only_when_told_so() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert refused("openai", openai(content=parts)) == ("content_is_one_text", "messages[1].content")
    joined = convert("openai", openai(content=parts), joins_parts=True)
    assert joined["messages"][1]["content"] == "ab"


def test_one_part_is_no_join() -> None:
    assert convert("openai", openai(content=[{"type": "text", "text": "a"}])) == openai()


@pytest.mark.parametrize("joins", [True, False])
def test_a_picture_is_refused_whatever_is_told(joins: bool) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    expected = ("content_is_text", "messages[1].content[1]")
    assert refused("openai", openai(content=parts), joins_parts=joins) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (openai(content=None, tool_calls=[{"id": "x"}]), ("tools_unsupported", "messages[1].tool_calls")),
        (openai(role="tool"), ("tools_unsupported", "messages[1].role")),
        ({**openai(), "tools": [{"type": "function"}]}, ("tools_unsupported", "tools")),
        ({**openai(), "functions": [{"name": "f"}]}, ("tools_unsupported", "functions")),
        (openai(weight=2), ("weight", "messages[1].weight")),
        (openai(weight=True), ("weight", "messages[1].weight")),
        (openai(weight=0), ("assistant_turn", "messages")),
        (
            {"messages": [{"role": "user", "content": "q", "weight": 0}, *messages(("a", "b"))]},
            ("weight_of_assistant", "messages[0].weight"),
        ),
        ({"messages": {}}, ("messages_is_list", "messages")),
        ({"messages": ["hi"]}, ("message_is_object", "messages[0]")),
        ({"messages": [{"role": "user"}]}, ("content_is_text", "messages[0].content")),
    ],
)
def test_what_is_wrong_with_an_openai_row_is_said(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert refused("openai", row) == expected


# ---------------------------------------------------------------- tables


def test_an_empty_system_cell_and_empty_turns_at_the_end_are_no_messages() -> None:
    mapped = ["s=system", "q1=user", "a1=assistant", "q2=user", "a2=assistant"]
    row = {"s": "", "q1": "a", "a1": "b", "q2": "", "a2": " "}
    assert convert("csv", row, *mapped) == {"messages": messages(("a", "b"))}


def test_an_empty_turn_in_the_middle_is_a_mistake() -> None:
    mapped = ["q1=user", "a1=assistant", "q2=user", "a2=assistant"]
    row = {"q1": "a", "a1": "", "q2": "c", "a2": "d"}
    assert refused("csv", row, *mapped) == ("content_not_empty", "a1")


def test_a_column_that_is_not_there_is_named() -> None:
    assert refused("csv", {"q": "a"}, "q=user", "a=assistant") == ("column_present", "a")
    assert refused("csv", {"q": "a"}) == ("column_present", "user")


# ---------------------------------------------------------------- columns


def test_other_columns_are_kept_behind_the_messages_or_dropped_and_counted() -> None:
    row = {"id": 7, "prompt": "q", "completion": "a", "score": 0.5}
    assert list(convert("prompt-completion", row)) == ["messages", "id", "score"]
    conversion = Conversion("prompt-completion", keeps_columns=False)
    assert conversion(row) == {"messages": messages(("q", "a"))}
    assert conversion.notes == {"column 'id' dropped": 1, "column 'score' dropped": 1}


@pytest.mark.parametrize(
    ("kind", "mapped", "said"),
    [
        ("alpaca", {"q": "question"}, "can be one of instruction"),
        ("sharegpt", {"bot": "assistent"}, "or a speaker one of system, user, assistant"),
        ("prompt-completion", {"a": "prompt", "b": "prompt"}, "two columns the meaning prompt"),
        ("csv", {"a": "human"}, "can be one of system, user, assistant"),
    ],
)
def test_a_mapping_to_nothing_is_refused(kind: Kind, mapped: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Conversion(kind, mapped)


@pytest.mark.parametrize(
    ("kind", "column"),
    [("sharegpt", "conversations"), ("openai", "messages"), ("alpaca", "history"), ("csv", "")],
)
def test_the_column_of_json_in_a_table_is_the_layouts_own(kind: Kind, column: str) -> None:
    assert Conversion(kind).json_column == column
    assert Conversion("sharegpt", {"x": "conversations"}).json_column == "x"


# ---------------------------------------------------------------- finding out


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "p", "messages": []}, "openai"),
        ({"messages": '[{"role": "user"}]'}, "openai"),
        ({"id": 1, "conversations": []}, "sharegpt"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"prompt": "", "completion": ""}, "prompt-completion"),
        ({"user": "", "assistant": ""}, "csv"),
    ],
)
def test_a_layout_is_told_by_its_columns(row: dict[str, Any], kind: Kind) -> None:
    assert detect([row]).kind == kind
    assert detect([row] * 3).why.endswith("in each of the first 3 rows")


def test_a_layout_is_told_under_the_names_that_are_mapped() -> None:
    assert detect([{"q": "", "a": ""}], {"q": "prompt", "a": "completion"}).kind == "prompt-completion"


def test_rows_of_two_layouts_are_not_guessed_at() -> None:
    rows = [{"messages": []}, {"messages": []}, {"conversations": []}, {"x": 1}]
    with pytest.raises(DataError, match="openai in 2, sharegpt in 1, none in 1"):
        detect(rows)


def test_names_that_look_like_a_layout_lead_to_the_command() -> None:
    with pytest.raises(DataError) as none:
        detect([{"Question": "q", "Answer": "a"}])
    assert "--map Question=prompt --map Answer=completion" in str(none.value.next_move)
    with pytest.raises(DataError) as nothing:
        detect([{"text": "a"}])
    assert "--from" in str(nothing.value.next_move)
    with pytest.raises(DataError, match="no row"):
        detect([])


# ---------------------------------------------------------------- writing


def test_what_orjson_cannot_write_is_written_too() -> None:
    for row in ({"n": 1 << 80}, {"s": "\ud800"}, {"s": "é/"}):
        assert json.loads(json_line(row)) == row
    with pytest.raises(DataError, match="bytes"):
        json_line({"b": b"x"})
