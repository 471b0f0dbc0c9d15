"""Rows of other layouts as conversations: ShareGPT, Alpaca, prompt and completion, OpenAI's, tables.

    conversion = Conversion("sharegpt", {"bing": "assistant"})
    converted = conversion(row)          # {"messages": [...], ...}, or findings that say why not

A row is converted exactly or reported: text is never trimmed, joined or reworded, but for two joins that are
counted in `notes` (Alpaca's input; parts of a text, when asked for). Pure: never import what reads or writes
files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal, NamedTuple, get_args

import orjson

from tuneloop.core.chat import ROLES, Finding
from tuneloop.core.data.rules import check_row, is_error
from tuneloop.core.errors import DataError, UsageError

Kind = Literal["sharegpt", "alpaca", "prompt-completion", "openai", "csv"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Value = Mapping[str, Any]
Message = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Who speaks, as the files that go by ShareGPT's name have it."""

OPENAI_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""`developer` is OpenAI's newer name for `system`."""

_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_TOOL_COLUMNS = ("tools", "functions")

COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "sharegpt": ("conversations", "from", "value", "system_prompt"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt-completion": ("prompt", "completion", "system"),
    "openai": ("messages",),
    "csv": ROLES,
}
"""What a column, or a key, can mean in each layout; a column of that name means it without being told."""


class _Refused(Exception):
    def __init__(self, rule: str, field: str, value: object, fix: str) -> None:
        super().__init__(rule)
        self.finding = Finding(rule, field, _shown(value), fix)


class Conversion:
    """One layout, and what its columns or speakers are called in this file.

    `mapping`: name in the file to what it means: a column of `COLUMNS`, in ShareGPT also a speaker to a role.
    For a table the order of the mapping is the order of the turns. `keeps_columns`: columns that are not
    converted stand behind `messages` as they were; else they are dropped, and counted in `notes`.
    """

    def __init__(
        self,
        kind: Kind,
        mapping: Mapping[str, str] | None = None,
        *,
        keeps_columns: bool = True,
        joins_parts: bool = False,
    ) -> None:
        self.kind = kind
        self.notes: Counter[str] = Counter()
        """What was done to converted rows beyond renaming, with how often."""
        self._done: Counter[str] = Counter()
        self._keeps_columns = keeps_columns
        self._joins_parts = joins_parts
        mapping = dict(mapping or {})
        self._speakers = dict(SHAREGPT_ROLES if kind == "sharegpt" else OPENAI_ROLES)
        if kind in ("sharegpt", "openai"):
            speakers = {name: meant for name, meant in mapping.items() if meant in ROLES}
            self._speakers.update(speakers)
            mapping = {name: meant for name, meant in mapping.items() if name not in speakers}
        self._columns = _columns(kind, mapping)
        self._turns = list(mapping.items()) if kind == "csv" else []
        if kind == "csv" and not self._turns:
            self._turns = [(role, role) for role in ROLES]

    @property
    def json_column(self) -> str:
        """The column whose cells hold JSON in a table."""
        meant = {"sharegpt": "conversations", "openai": "messages", "alpaca": "history"}.get(self.kind)
        return self._columns[meant] if meant else ""

    def __call__(self, row: Value) -> dict[str, Any] | list[Finding]:
        self._done.clear()
        try:
            self._refuse_tools(row)
            used, messages = _CONVERT[self.kind](self, row)
            found = {"messages": messages, **self._kept(row, used)}
        except _Refused as refused:
            return [refused.finding]
        if findings := [finding for finding in check_row(found) if is_error(finding)]:
            return findings
        self.notes.update(self._done)
        return found

    def _kept(self, row: Value, used: set[str]) -> dict[str, Any]:
        kept = {}
        for name, value in row.items():
            if name in used:
                continue
            if name in _TOOL_COLUMNS or not self._keeps_columns:
                self._done[f"column {name!r} dropped"] += 1
            elif name == "messages":
                fix = "Drop it with --columns drop, or convert it: --from openai."
                raise _Refused("messages_free", "messages", value, fix)
            else:
                kept[name] = value
        return kept

    # ------------------------------------------------------------ layouts

    def _sharegpt(self, row: Value) -> tuple[set[str], list[Message]]:
        column = self._columns["conversations"]
        turns = _present(row, column, self.kind)
        if not isinstance(turns, list) or not turns:
            raise _Refused("turns_are_list", column, turns, 'Write a list of {"from": ..., "value": ...}.')
        used, messages = {column}, list[Message]()
        named = self._columns["system_prompt"]
        top = "system" if named == "system_prompt" and named not in row else named
        messages.extend(self._optional_system(row, top))
        used.add(top)
        messages.extend(self._turn(f"{column}[{number}]", turn) for number, turn in enumerate(turns))
        return used, messages

    def _turn(self, where: str, turn: Any) -> Message:
        if not isinstance(turn, dict):
            raise _Refused("turn_is_object", where, turn, 'Write {"from": ..., "value": ...}.')
        speaker, text = self._columns["from"], self._columns["value"]
        if speaker not in turn and "role" in turn:
            speaker, text = "role", "content"
        role = self._role(f"{where}.{speaker}", turn.get(speaker))
        content = self._content(f"{where}.{text}", turn.get(text))
        return self._message(where, turn, role, content, (speaker, text))

    def _openai(self, row: Value) -> tuple[set[str], list[Message]]:
        column = self._columns["messages"]
        written = _present(row, column, self.kind)
        if not isinstance(written, list) or not written:
            raise _Refused("messages_is_list", column, written, 'Write a list of {"role", "content"}.')
        used = {column}
        if row.get("parallel_tool_calls") is not None:
            self._done["column 'parallel_tool_calls' dropped"] += 1
            used.add("parallel_tool_calls")
        return used, [self._openai_message(f"{column}[{n}]", message) for n, message in enumerate(written)]

    def _openai_message(self, where: str, message: Any) -> Message:
        if not isinstance(message, dict):
            raise _Refused("message_is_object", where, message, 'Write {"role": ..., "content": ...}.')
        role = self._role(f"{where}.role", message.get("role"))
        self._refuse_tool_keys(where, message)
        content = self._content(f"{where}.content", message.get("content"))
        return self._message(where, message, role, content, ("role", "content"))

    def _alpaca(self, row: Value) -> tuple[set[str], list[Message]]:
        names = [self._columns[meant] for meant in COLUMNS["alpaca"]]
        instruction, more, output, system, history = names
        if instruction not in row and more not in row:
            _present(row, instruction, self.kind)
        messages = self._optional_system(row, system)
        messages.extend(self._history(history, row.get(history)))
        asked = [row[name] for name in (instruction, more) if _text_or_none(row, name)]
        if not asked:
            raise _Refused(
                "content_not_empty", instruction, row.get(instruction), "Write what the user asks."
            )
        if len(asked) == 2:
            self._done["instruction and input joined by a line break"] += 1
        messages.append({"role": "user", "content": "\n".join(asked)})
        answer = self._content(output, _present(row, output, self.kind))
        messages.append({"role": "assistant", "content": answer})
        return set(names), messages

    def _history(self, column: str, history: Any) -> list[Message]:
        """Earlier rounds, `[[question, answer], ...]`."""
        messages: list[Message] = []
        if history in (None, "", []):
            return messages
        for number, pair in enumerate(history if isinstance(history, list) else [history]):
            where = f"{column}[{number}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise _Refused("history_of_pairs", where, pair, "Write a list of [question, answer].")
            for place, role in enumerate(("user", "assistant")):
                content = self._content(f"{where}[{place}]", pair[place])
                messages.append({"role": role, "content": content})
        return messages

    def _prompt_completion(self, row: Value) -> tuple[set[str], list[Message]]:
        prompt, completion, system = (self._columns[name] for name in COLUMNS["prompt-completion"])
        asked, answered = _present(row, prompt, self.kind), _present(row, completion, self.kind)
        messages = self._optional_system(row, system)
        if isinstance(asked, list) and isinstance(answered, list):
            messages.extend(self._prompt_of_messages(prompt, asked))
            messages.extend(
                self._openai_message(f"{completion}[{n}]", each) for n, each in enumerate(answered)
            )
        else:
            messages.append({"role": "user", "content": self._content(prompt, asked)})
            messages.append({"role": "assistant", "content": self._content(completion, answered)})
        return {prompt, completion, system}, messages

    def _prompt_of_messages(self, column: str, prompt: list[Any]) -> list[Message]:
        """Answers in a prompt are read, and not learned: only the completion is."""
        messages = [self._openai_message(f"{column}[{number}]", each) for number, each in enumerate(prompt)]
        for message in messages:
            if message["role"] == "assistant" and "weight" not in message:
                message["weight"] = 0
                self._done["answers in a prompt given the weight 0"] += 1
        return messages

    def _table(self, row: Value) -> tuple[set[str], list[Message]]:
        missing = [name for name, role in self._turns if name not in row and role != "system"]
        if missing:
            columns = ", ".join(map(str, row))
            raise _Refused(
                "column_present",
                missing[0],
                _Words(f"only {columns}"),
                "Say which column is whose: --map COLUMN=user --map COLUMN=assistant, in the order of the "
                "turns.",
            )
        last = max((n for n, (name, _) in enumerate(self._turns) if _text_or_none(row, name)), default=-1)
        messages = [
            {"role": role, "content": self._content(name, row.get(name))}
            for name, role in self._turns[: last + 1]
            if role != "system" or _text_or_none(row, name)
        ]
        return {name for name, _ in self._turns}, messages

    # ------------------------------------------------------------ pieces

    def _role(self, where: str, speaker: Any) -> str:
        role = self._speakers.get(speaker) if isinstance(speaker, str) else None
        if role is not None:
            if speaker == "developer":
                self._done["role 'developer' written as 'system'"] += 1
            return role
        if speaker in _TOOL_ROLES:
            raise _Refused("tools_unsupported", where, speaker, _NO_TOOLS)
        known = ", ".join(sorted(set(self._speakers)))
        fix = f"Known are {known}; say what it means: --map {speaker}=user, or =assistant, or =system."
        raise _Refused("role_known", where, speaker, fix)

    def _content(self, where: str, content: Any) -> str:
        if isinstance(content, list) and content:
            content = self._joined(where, content)
        if not isinstance(content, str):
            raise _Refused("content_is_text", where, content, "Write the text as one string.")
        if not content.strip():
            raise _Refused("content_not_empty", where, content, "Write the text, or remove the turn.")
        return content

    def _joined(self, where: str, parts: list[Any]) -> str:
        texts: list[str] = []
        for number, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            text = part.get("text") if isinstance(part, dict) and kind == "text" else None
            if not isinstance(text, str):
                fix = "Only text can be learned: remove the part, or the row."
                raise _Refused("content_is_text", f"{where}[{number}]", _Words(f"a part of type {kind}"), fix)
            texts.append(text)
        if len(texts) > 1:
            if not self._joins_parts:
                fix = "Join them with --join-parts (nothing is put between them), or write one string."
                raise _Refused("content_is_one_text", where, _Words(f"{len(texts)} parts of text"), fix)
            self._done["parts of a text joined"] += 1
        return "".join(texts)

    def _message(self, where: str, turn: Value, role: str, content: str, used: Iterable[str]) -> Message:
        self._refuse_tool_keys(where, turn)
        message: Message = {"role": role, "content": content}
        weight = turn.get("weight")
        if weight is not None:
            if isinstance(weight, bool) or weight not in (0, 1):
                raise _Refused("weight", f"{where}.weight", weight, "Write 0 or 1.")
            if role != "assistant":
                fix = "Only what the assistant says is learned: remove the weight."
                raise _Refused("weight_of_assistant", f"{where}.weight", weight, fix)
            message["weight"] = int(weight)
        for key, value in turn.items():
            if key not in (*used, "weight") and value not in (None, "", [], {}):
                self._done[f"key {key!r} of a turn dropped"] += 1
        return message

    def _optional_system(self, row: Value, column: str) -> list[Message]:
        text = _text_or_none(row, column)
        return [{"role": "system", "content": text}] if text else []

    def _refuse_tools(self, row: Value) -> None:
        for column in _TOOL_COLUMNS:
            if row.get(column) not in (None, "", "[]", [], {}):
                raise _Refused("tools_unsupported", column, row[column], _NO_TOOLS)

    def _refuse_tool_keys(self, where: str, turn: Value) -> None:
        for key in _TOOL_KEYS:
            if turn.get(key):
                raise _Refused("tools_unsupported", f"{where}.{key}", turn[key], _NO_TOOLS)


_NO_TOOLS = "Tool calls are not learned: take the row out, or write the call and its result as text."

_CONVERT: Mapping[Kind, Callable[[Conversion, Value], tuple[set[str], list[Message]]]] = {
    "sharegpt": Conversion._sharegpt,
    "openai": Conversion._openai,
    "alpaca": Conversion._alpaca,
    "prompt-completion": Conversion._prompt_completion,
    "csv": Conversion._table,
}


def _columns(kind: Kind, mapping: Mapping[str, str]) -> dict[str, str]:
    """What is meant, to its name in the file. Raises `UsageError` for a mapping to nothing that there is."""
    known = COLUMNS[kind]
    for name, meant in mapping.items():
        if meant not in known:
            more = f", or a speaker one of {', '.join(ROLES)}" if kind in ("sharegpt", "openai") else ""
            raise UsageError(
                f"--map {name}={meant}: with --from {kind} a column can be one of {', '.join(known)}{more}."
            )
    if kind == "csv":
        return {}
    doubled = [meant for meant, count in Counter(mapping.values()).items() if count > 1]
    if doubled:
        raise UsageError(f"--map gives two columns the meaning {doubled[0]}.")
    return {**{meant: meant for meant in known}, **{meant: name for name, meant in mapping.items()}}


def _present(row: Value, column: str, kind: Kind) -> Any:
    if column in row:
        return row[column]
    columns = ", ".join(map(str, row)) or "none"
    fix = f"Give each row that column, say which one it is (--map COLUMN={column}), or choose another --from."
    raise _Refused("column_present", column, _Words(f"only {columns}"), fix)


def _text_or_none(row: Value, column: str) -> str | None:
    """The text of a column that may be empty or absent."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise _Refused("content_is_text", column, value, "Write the text as one string.")
    return value


class _Words(str):
    """Said of a value, where the value itself would not help."""

    __slots__ = ()


def _shown(value: object) -> str:
    text = value if isinstance(value, _Words) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------- finding out


class Detected(NamedTuple):
    kind: Kind
    why: str
    """For people: by what it was told."""


def detect(rows: Sequence[Value], mapping: Mapping[str, str] | None = None) -> Detected:
    """The layout of these first rows of a file, under the names that `mapping` gives their columns. Raises
    `DataError` when they are of none or of several."""
    if not rows:
        raise DataError("There is no row to tell the layout by.", next_move="Name it: --from ...")
    meant = mapping or {}
    kinds = [_kind_of({meant.get(name, name): value for name, value in row.items()}) for row in rows]
    found = Counter(kind for kind in kinds if kind)
    if len(found) == 1 and None not in kinds:
        kind = next(iter(found))
        place = "the first row" if len(rows) == 1 else f"each of the first {len(rows)} rows"
        return Detected(kind, f"{_SIGNS[kind]} in {place}")
    if not found:
        names = list(map(str, rows[0]))
        raise DataError(
            f"No layout that is known has these columns: {', '.join(names)}.", next_move=_suggestion(names)
        )
    counted = ", ".join(f"{kind} in {count}" for kind, count in found.most_common())
    neither = f", none in {kinds.count(None)}" if None in kinds else ""
    raise DataError(
        f"The first {len(rows)} rows are of several layouts: {counted}{neither}.",
        next_move="Name one with --from, and allow the others as bad rows: --bad-rows N",
    )


_SIGNS: Mapping[Kind, str] = {
    "openai": "a list 'messages' of role and content",
    "sharegpt": "a list 'conversations' of speaker and text",
    "alpaca": "the columns 'instruction' and 'output'",
    "prompt-completion": "the columns 'prompt' and 'completion'",
    "csv": "the columns 'user' and 'assistant'",
}


def _kind_of(row: Value) -> Kind | None:
    if _is_list(row.get("messages")):
        return "openai"
    if _is_list(row.get("conversations")):
        return "sharegpt"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt-completion"
    return "csv" if "user" in row and "assistant" in row else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


_PAIRS = (("prompt", "response"), ("question", "answer"), ("input", "output"), ("query", "response"))


def _suggestion(names: Sequence[str]) -> str:
    lower = {name.lower(): name for name in names}
    for asked, answered in _PAIRS:
        if asked in lower and answered in lower:
            return (
                f"If they are what they are called: --from prompt-completion --map {lower[asked]}=prompt "
                f"--map {lower[answered]}=completion"
            )
    return f"Name the layout with --from ({', '.join(KINDS)}) and its columns with --map COLUMN=MEANING."


# ---------------------------------------------------------------- writing


def json_line(row: Value) -> bytes:
    """UTF-8, with a line end. Raises `DataError` for what JSON has no words for (bytes, say)."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        # Whole numbers of more than 64 bits, half surrogate pairs, bytes.
        return json.dumps(row, separators=(",", ":"), default=_no_words).encode("ascii") + b"\n"


def _no_words(value: object) -> str:
    if isinstance(value, Decimal | date | time):
        return str(value)
    raise DataError(
        f"A column holds {type(value).__name__}, which JSON has no words for.",
        next_move="Leave the columns that are not converted out: --columns drop",
    )
