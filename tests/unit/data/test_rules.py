"""The rules of a row: without a model, and with a template."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import TEMPLATES, TOKENS
from tuneloop.core.chat import ChatTemplate
from tuneloop.core.data.rows import Row, id_of
from tuneloop.core.data.rules import RULES, check_row, check_template, is_error, special_text
from tuneloop.core.errors import DataError, Unsupported

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Paris? "},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "And Lyon?"},
    {"role": "assistant", "content": "In France, too. 🙂"},
]
USER, ANSWER = TALK[1], TALK[2]


def template(family: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[family], TOKENS[family], family)


def rules_of(row: object, column: str = "messages") -> list[tuple[str, str]]:
    return [(finding.rule, finding.field) for finding in check_row(row, column)]


def test_a_good_row_has_no_findings() -> None:
    assert check_row({"prompt": "x", "prompt_id": "1", "messages": TALK}) == []
    assert check_row({"messages": [USER, {**ANSWER, "weight": 1}, USER, {**ANSWER, "weight": 0}]}) == []
    assert check_row({"messages": [{**USER, "name": None}, {**ANSWER, "tool_calls": []}]}) == []


def test_all_mistakes_of_a_row_are_found_at_once() -> None:
    row = {"messages": [{"role": "bot", "content": ""}, {"role": "user", "content": 3}], "tools": [1]}
    assert [rule for rule, _ in rules_of(row)] == [
        "role_known",
        "content_not_empty",
        "content_is_text",
        "tools_unsupported",
        "assistant_turn",
    ]


def test_what_is_no_object_is_found() -> None:
    assert rules_of([]) == [("row_is_object", "")]


def test_fields_are_named_by_the_column_that_was_asked_for() -> None:
    row = {"messages": "unread", "talk": [{"role": "user", "content": 1}, ANSWER]}
    assert rules_of(row, "talk") == [("content_is_text", "talk[0].content")]
    assert rules_of({"messages": TALK}, "talk") == [("messages_present", "talk")]


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("User", "Write 'user'"),
        ("tool", "Tool calls are not learned"),
        ("developer", "write 'system'"),
        ("gpt", "ShareGPT"),
        (["user"], "Use one of system, user, assistant"),
    ],
)
def test_a_role_that_is_not_known_is_told_what_to_become(role: object, words: str) -> None:
    [finding] = check_row({"messages": [{"role": role, "content": "a"}, ANSWER]})
    assert finding.rule == "role_known"
    assert words in finding.fix


def test_every_finding_that_the_code_can_make_is_in_the_table() -> None:
    from pathlib import Path

    import tuneloop.core.data as package

    [folder] = package.__path__
    text = "".join(path.read_text("utf-8") for path in Path(folder).glob("*.py"))
    made = set(re.findall(r'Finding\(\s*"(\w+)"', text))
    assert made <= set(RULES)
    assert set(RULES) - made <= {"learned_token", "max_seq_length"}


def test_a_row_is_known_by_the_usual_names() -> None:
    assert id_of({"uuid": "u", "id": 7, "messages": []}) == "7"
    assert id_of({"id": "", "uuid": "u"}) == "u"
    assert id_of({"id": {"a": 1}, "prompt_id": True}) is None
    assert id_of(None) is None


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize("family", sorted(TEMPLATES))
def test_a_conversation_in_turns_is_taken_by_every_template(family: str) -> None:
    assert check_template(template(family), TALK[1:]) == []


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_turns_that_do_not_alternate_are_found_where_the_template_stops(family: str) -> None:
    messages = [*TALK[1:3], USER, USER, ANSWER]
    [finding] = check_template(template(family), messages)
    assert (finding.rule, finding.field) == ("template", "messages[3].role")
    assert finding.value.startswith(f'"user" after "user"; {family} says: ')
    assert "have to take turns" in finding.value
    assert finding.fix.startswith("Join the two user messages")
    assert check_template(template("qwen2"), messages) == []


def test_a_conversation_that_begins_with_the_answer_is_refused_where_the_template_does() -> None:
    [finding] = check_template(template("gemma3"), [ANSWER, USER, ANSWER])
    assert (finding.rule, finding.field) == ("template", "messages[0].role")
    assert '"assistant" first' in finding.value


def test_a_system_message_that_the_template_drops_is_found() -> None:
    source = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    [finding] = check_template(ChatTemplate(source, {"eos_token": "</s>"}, "T"), TALK)
    assert (finding.rule, finding.field) == ("template_drops", "messages[0]")
    assert finding.value == "a system message that T leaves out"


@pytest.mark.parametrize(("family", "rule"), [("phi3", "template_drops"), ("qwen2", None)])
def test_of_a_tool_message_it_is_told_whether_this_template_drops_it(family: str, rule: str | None) -> None:
    messages = [USER, {"role": "tool", "content": "42 degrees"}, ANSWER]
    assert [finding.rule for finding in check_template(template(family), messages)] == (
        [rule] if rule else []
    )


def test_answers_that_cannot_be_located_are_found() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}\n{% endfor %}"
    [finding] = check_template(ChatTemplate(source, {}, "T"), [{"role": "user", "content": "A"}, ANSWER])
    assert finding.rule == "template_answers"


def test_special_tokens_written_out_are_found_with_their_place() -> None:
    pattern = re.compile(r"<\|im_end\|>|</s>")
    messages = [USER, {"role": "assistant", "content": "say <|im_end|> and </s>"}]
    [finding] = special_text(pattern, messages)
    assert finding == ("special_text", "messages[1].content", "'<|im_end|>' at 4", finding.fix)
    assert not is_error(finding)
    assert special_text(pattern, TALK) == []


# ---------------------------------------------------------------- any row

_TEXTS = st.text(max_size=8) | st.sampled_from(["", " ", "\ud800", "hi", "🙂"])
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)
_ROLES = st.sampled_from(["system", "user", "assistant", "tool", "User", "human", None]) | _ANY
_MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": _ROLES, "content": _TEXTS | _ANY, "weight": _ANY | st.just(0), "name": _ANY}
)
_ROWS = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(_MESSAGES | _ANY, max_size=4) | _ANY, "id": _ANY, "tools": _ANY}
)


@settings(max_examples=400, deadline=None)
@given(_ROWS | _ANY)
def test_any_row_is_rendered_or_reported(row: Any) -> None:
    findings = check_row(row)
    assert all(finding.rule in RULES and finding.fix for finding in findings)
    assert all(len(finding.value) <= 80 for finding in findings)
    if any(map(is_error, findings)):
        return
    for family in ("qwen2", "gemma3", "phi3", "mistral"):
        told = check_template(template(family), row["messages"])
        if not told:
            assert template(family).segments(row["messages"]).text
            continue
        assert all(finding.rule.startswith("template") for finding in told)
        with pytest.raises((DataError, Unsupported)):
            template(family).segments(row["messages"])


@settings(max_examples=200, deadline=None)
@given(_ROWS)
def test_the_quick_look_at_a_row_never_passes_what_the_long_one_finds(row: dict[str, Any]) -> None:
    from tuneloop.core.data import rules

    quick = check_row(row)
    plain, rules._is_plain = rules._is_plain, lambda _: False
    try:
        assert check_row(row) == quick
    finally:
        rules._is_plain = plain


def test_a_row_knows_its_place() -> None:
    assert Row(3, 5, {"a": 1}).findings == ()
