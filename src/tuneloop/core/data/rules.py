"""The rules that a row must keep, in one table, and what tells them of a row.

`check_row` needs no model. `check_template` and `special_text` need the model's chat template and its special
tokens. What needs a whole file (duplicates, leakage) is in `check`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tuneloop.core.chat import ROLES, ChatTemplate, Finding, Message
from tuneloop.core.errors import DataError, Unsupported

Severity = Literal["error", "warning"]


class Rule(NamedTuple):
    name: str
    what: str
    """What a row, or a file, needs."""
    fix: str
    severity: Severity
    needs: Literal["file", "row", "template", "tokens"]
    """What has to be at hand to tell."""


_TABLE = (
    # ------------------------------------------------------------ reading
    Rule("readable", "the disk gives the file", "Copy the file elsewhere.", "error", "file"),
    Rule("gzip", "gzip data without damage", "Copy or download the file again.", "error", "file"),
    Rule("truncated", "a file that ends where a row ends", "Write the file again.", "error", "file"),
    Rule("encoding", "text in UTF-8, or in UTF-16 with its mark", "Save the file as UTF-8.", "error", "file"),
    Rule(
        "nul_bytes", "no bytes of zero", "Write the file again: it was cut, or is no text.", "error", "file"
    ),
    Rule("json", "valid JSON", "Mend it where the finding says.", "error", "file"),
    Rule("key_once", "`messages`, `role` and `content` once in an object", "Remove one.", "error", "file"),
    Rule("row_is_object", "an object with named values", "Write an object.", "error", "file"),
    Rule("row_size", "at most 16 MiB in a row", "Split the row.", "error", "file"),
    Rule("one_list", "one list of rows in a JSON file", "Write each list to its own file.", "error", "file"),
    Rule("header", "a different name for each column", "Rename the columns.", "error", "file"),
    Rule("cells", "as many cells as the header names", "Quote cells that hold commas.", "error", "file"),
    Rule("quotes", "quotes inside of a quoted cell doubled", "Double them.", "error", "file"),
    Rule(
        "cell_is_json", "the conversation as JSON in its cell", "Write json.dumps(messages).", "error", "file"
    ),
    Rule("parquet", "Parquet pages without damage", "Write or download the file again.", "error", "file"),
    # ------------------------------------------------------------ a row
    Rule("messages_present", "a key `messages`", "Add it, or convert the file.", "error", "row"),
    Rule("messages_is_list", "a list in `messages`", "Write a list.", "error", "row"),
    Rule("message_is_object", 'messages of `{"role", "content"}`', "Write objects.", "error", "row"),
    Rule("role_known", "the roles `system`, `user`, `assistant`", "Use one of them.", "error", "row"),
    Rule("content_is_text", "one string in every `content`", "Write the text as one string.", "error", "row"),
    Rule("content_not_empty", "more than space in every `content`", "Remove the message.", "error", "row"),
    Rule("content_is_unicode", "no half surrogate pairs", "Write the character meant.", "error", "row"),
    Rule("assistant_turn", "an answer of the assistant to learn", "Add it.", "error", "row"),
    Rule("tools_unsupported", "no `tools`", "Remove them.", "error", "row"),
    Rule("key_unsupported", "no tool calls or reasoning beside the content", "Remove them.", "error", "row"),
    Rule("weight", "0 or 1 where a message has a `weight`", "Write 0 or 1.", "error", "row"),
    Rule("key_ignored", "no keys in a message that may not be learned", "Remove them.", "warning", "row"),
    Rule("system_first", "the system message first", "Move it to the beginning.", "warning", "row"),
    Rule("last_turn", "the assistant's turn last", "Remove what follows it.", "warning", "row"),
    # ------------------------------------------------------------ the model
    Rule("template", "an order of roles that the template takes", "Change the order.", "error", "template"),
    Rule("template_drops", "no message that the template leaves out", "Move its text.", "error", "template"),
    Rule("template_answers", "answers that the template does not rewrite", "Mark them.", "error", "template"),
    Rule("special_text", "no special tokens written out in a text", "Reword it.", "warning", "template"),
    Rule("learned_token", "a token to learn within `max_seq_length`", "Raise it.", "error", "tokens"),
    Rule("max_seq_length", "no more tokens than `max_seq_length`", "Choose `long_rows`.", "error", "tokens"),
    # ------------------------------------------------------------ files
    Rule("duplicate", "each conversation once in a file", "Drop the copies.", "warning", "file"),
    Rule("leak", "no conversation in two splits", "Remove it from one of them.", "error", "file"),
    Rule("opening_leak", "no opening line in two splits", "Split by opening line.", "warning", "file"),
)

RULES: Mapping[str, Rule] = {rule.name: rule for rule in _TABLE}


def is_error(finding: Finding) -> bool:
    rule = RULES.get(finding.rule)
    return rule is None or rule.severity == "error"


# ---------------------------------------------------------------- a row, without a model

_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'

_REFUSED_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that some templates obey and others drop in silence."""

_KNOWN_KEYS = ("role", "content", "weight", *_REFUSED_KEYS)

_OTHER_LAYOUTS = (("conversations",), ("instruction", "output"), ("prompt", "completion"))
"""ShareGPT, Alpaca, prompt and completion."""

_ROLE_FIXES = {
    "tool": "Tool calls are not learned: write the result into a user message, or remove the row.",
    "function": "Tool calls are not learned: write the result into a user message, or remove the row.",
    "developer": "It is another name for the system message: write 'system'.",
    "human": "These are ShareGPT's names: convert the file, or write 'user'.",
    "gpt": "These are ShareGPT's names: convert the file, or write 'assistant'.",
}


def check_row(row: object, column: str = "messages") -> list[Finding]:
    """What is wrong with a row, as far as it can be told without a model. Without errors: the row can be
    rendered, if the template takes its order."""
    if isinstance(row, dict) and _is_plain(row.get(column)) and not row.get("tools"):
        return []
    if not isinstance(row, dict):
        return [Finding("row_is_object", "", _shown(row), f"Write every line as an object: {_SHAPE}")]
    messages = row.get(column)
    if messages is None:
        return [_no_messages(row, column)]
    if not isinstance(messages, list):
        return [Finding("messages_is_list", column, _shown(messages), f"Write a list: {_SHAPE}")]
    return [
        *(
            found
            for number, message in enumerate(messages)
            for found in _check_message(column, number, message)
        ),
        *_check_tools(row),
        *_check_order(column, [message for message in messages if isinstance(message, dict)], len(messages)),
    ]


def _is_plain(messages: object) -> bool:
    """The quick look that nearly every row passes. It may say no to a good row, never yes to a bad one."""
    if type(messages) is not list or not messages:
        return False
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return False
        content = message.get("content")
        if type(content) is not str or not content or content.isspace() or message.get("role") not in ROLES:
            return False
        if not content.isascii() and not _is_unicode(content):
            return False
    later_roles = [message["role"] for message in messages[1:]]
    return messages[-1]["role"] == "assistant" and "system" not in later_roles


def _no_messages(row: Mapping[str, Any], column: str) -> Finding:
    keys = ", ".join(f"'{key}'" for key in row)
    found = f"only {_short(keys)}" if keys else "an empty object"
    fix = f"Give every row a list: {_SHAPE}"
    if any(set(layout) <= set(row) for layout in _OTHER_LAYOUTS):
        fix = f"{fix} The command `tuneloop data convert` makes it of this layout."
    return Finding("messages_present", column, found, fix)


def _check_tools(row: Mapping[str, Any]) -> list[Finding]:
    if not row.get("tools"):
        return []
    fix = "Tool calls are not learned; remove 'tools' from the row."
    return [Finding("tools_unsupported", "tools", _shown(row["tools"]), fix)]


def _check_order(column: str, messages: list[dict[str, Any]], count: int) -> list[Finding]:
    roles = [message.get("role") for message in messages]
    answers = [message for message in messages if message.get("role") == "assistant"]
    findings = []
    late = next((number for number, role in enumerate(roles) if number and role == "system"), None)
    if late is not None:
        fix = "Move it to the beginning, or into the user's message: most templates take it nowhere else."
        findings.append(
            Finding("system_first", f"{column}[{late}].role", f"message {late + 1} of {count}", fix)
        )
    if not answers:
        fix = "Add the assistant's answer, or remove the row: only what the assistant says is learned."
        shown = f"{count} message{'' if count == 1 else 's'}, none of the assistant"
        findings.append(Finding("assistant_turn", column, shown, fix))
    elif all(is_unlearned(message) for message in answers):
        fix = (
            "Give one of them the weight 1, or remove the row: an answer of weight 0 is read and not learned."
        )
        shown = f"{len(answers)} turn{'' if len(answers) == 1 else 's'} of the assistant, all of weight 0"
        findings.append(Finding("assistant_turn", column, shown, fix))
    elif roles[-1] != "assistant":
        fix = "Add the answer, or remove the message: nothing is learned from what follows the last answer."
        findings.append(Finding("last_turn", f"{column}[{count - 1}].role", _shown(roles[-1]), fix))
    return findings


def is_unlearned(message: Message) -> bool:
    """Whether an answer is read and not learned: OpenAI's `weight` of 0."""
    return message.get("weight") == 0 and message.get("weight") is not False


def _check_message(column: str, number: int, message: object) -> list[Finding]:
    where = f"{column}[{number}]"
    if not isinstance(message, dict):
        return [Finding("message_is_object", where, _shown(message), 'Write {"role": ..., "content": ...}.')]
    return [
        *_check_role(where, message.get("role")),
        *_check_keys(where, message),
        *_check_content(f"{where}.content", message.get("content")),
    ]


def _check_role(where: str, role: object) -> list[Finding]:
    if role in ROLES:
        return []
    name = role.strip().lower() if isinstance(role, str) else ""
    fix = f"Write '{name}'." if name in ROLES else _ROLE_FIXES.get(name, f"Use one of {', '.join(ROLES)}.")
    return [Finding("role_known", f"{where}.role", _shown(role), fix)]


def _check_keys(where: str, message: Mapping[str, Any]) -> list[Finding]:
    findings = []
    for key in _REFUSED_KEYS:
        if message.get(key):
            fix = f"Only 'role' and 'content' are learned; remove {key!r}, or write it into 'content'."
            findings.append(Finding("key_unsupported", f"{where}.{key}", _shown(message[key]), fix))
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        fix = "Write 1 for an answer to learn, 0 for one that is only read."
        findings.append(Finding("weight", f"{where}.weight", _shown(weight), fix))
    for key, value in message.items():
        if key not in _KNOWN_KEYS and value not in (None, "", [], {}):
            fix = "Templates are sure to write only role and content; remove it, or leave it unread."
            findings.append(Finding("key_ignored", f"{where}.{key}", _shown(value), fix))
    return findings


def _check_content(where: str, content: object) -> list[Finding]:
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        kinds = sorted({str(part.get("type")) for part in content})
        shown = f"a list of {len(content)} part{'' if len(content) == 1 else 's'} ({', '.join(kinds)[:40]})"
        fix = "Write the text as one string; pictures and sound are not learned."
        return [Finding("content_is_text", where, shown, fix)]
    if not isinstance(content, str):
        return [Finding("content_is_text", where, _shown(content), "Write the text as one string.")]
    if not content.strip():
        return [
            Finding("content_not_empty", where, _shown(content), "Write the text, or remove the message.")
        ]
    if not _is_unicode(content):
        fix = "Replace the broken escape (half of a surrogate pair) by the character that was meant."
        return [Finding("content_is_unicode", where, ascii(content)[:80], fix)]
    return []


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    return _short(json.dumps(value, ensure_ascii=False, default=repr))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------- a row, with the model's template


def check_template(
    template: ChatTemplate, messages: Sequence[Message], column: str = "messages"
) -> list[Finding]:
    """What the template refuses, or leaves out in silence, and where. `messages` have passed `check_row`, but
    for their roles: of a role that is not known, it is told what this template would do with it."""
    try:
        text = template.render(messages)
    except DataError as refused:
        return [_refused(template, messages, refused, column)]
    dropped = [
        _dropped(template, number, message, column)
        for number, message in enumerate(messages)
        if message["role"] != "assistant" and message["content"].strip() not in text
    ]
    return dropped or _check_answers(template, messages, column)


def _check_answers(template: ChatTemplate, messages: Sequence[Message], column: str) -> list[Finding]:
    try:
        template.segments(messages)
    except (DataError, Unsupported) as refused:
        fix = refused.next_move or "Change the conversation to what the template takes."
        return [Finding("template_answers", column, _short(refused.message), fix)]
    return []


def _refused(template: ChatTemplate, messages: Sequence[Message], refused: DataError, column: str) -> Finding:
    number = _first_refused(template, messages)
    role = messages[number]["role"] if messages else None
    before = f"after {_shown(messages[number - 1]['role'])}" if number else "first"
    words = refused.message.partition("refuses the conversation: ")[2] or refused.message
    shown = f"{_shown(role)} {before}; {template.origin} says: {words[:160]}"
    return Finding("template", f"{column}[{number}].role", shown, _fix_of_order(messages, number))


def _first_refused(template: ChatTemplate, messages: Sequence[Message]) -> int:
    """The message at which the template stops: the shortest beginning that it refuses ends there."""
    for number in range(len(messages)):
        try:
            template.render(messages[: number + 1])
        except DataError:
            return number
    return max(0, len(messages) - 1)


def _fix_of_order(messages: Sequence[Message], number: int) -> str:
    role = messages[number]["role"] if messages else ""
    if role == "system":
        return "Move its text into the first user message." if number == 0 else "Move it to the beginning."
    if number and messages[number - 1]["role"] == role:
        return f"Join the two {role} messages into one, or put the turn that is missing between them."
    if role not in ROLES:
        return "Write it into a user message, or remove it."
    return "Let user and assistant take turns, the user first."


def _dropped(template: ChatTemplate, number: int, message: Message, column: str) -> Finding:
    shown = f"a {message['role']} message that {template.origin} leaves out"
    return Finding(
        "template_drops", f"{column}[{number}]", shown, "Move its text into the first user message."
    )


def special_text(
    pattern: re.Pattern[str], messages: Iterable[Message], column: str = "messages"
) -> list[Finding]:
    """Special tokens written out in a text: the tokenizer makes the token of them. `pattern` matches any."""
    fix = "It is read as the token itself: reword it, unless that is what is meant."
    return [
        Finding("special_text", f"{column}[{number}].content", f"{found[0]!r} at {found.start()}", fix)
        for number, message in enumerate(messages)
        if (found := pattern.search(message["content"]))
    ]
