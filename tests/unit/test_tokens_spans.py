"""Marks from sums of lengths equal marks from the tokenizer's own offsets, or there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.models import tiny_tokenizer
from tuneloop.core.chat import ChatTemplate, mask_tokens
from tuneloop.core.data.rows import Row
from tuneloop.tokens import Backend, Tokenize
from tuneloop.tokens.spans import Spans

PHI3 = Path(__file__).parents[3] / "shared" / "data" / "phi3_tokenizer"

_SENTENCES = [
    "A recipe holds the base model, the data and every number of a run. It's 2026!",
    "Größe und Maß, naïve café, 日本語 текст 🙂 e\u0301",
    "    indented\n\n\ncode\t= 12 + 3.4",
] * 8

_PIECES = [
    *("a", "The", " capital", "hello", "'s", "!?", "12", "3.4", "é", "日", "🙂", "e\u0301", "ﬁ", "\u0130"),
    *(" ", "  ", "\n", "\n\n", "\t", "\x1c", "\x85", "\xa0", "\u3000", "\u2581", "\u2581\u2581", "<0x0A>"),
    *("<|im_end|>", "<|user|>", "<|end|>", "<s>", "</s>", "<unk>", "<|im_end", "|>"),
]


def added(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


def byte_level(*, trims: bool = False, nfc: bool = False, rstrip: bool = False) -> Tokenizer:
    """As GPT-2's descendants: Llama 3 trims offsets, Qwen brings text to NFC, Phi-4 takes spaces along."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if trims:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = [added("<|im_end|>"), added("<|user|>", rstrip=rstrip), added("<|end|>", lstrip=rstrip)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def with_blanks(prepend: str) -> Tokenizer:
    """As SentencePiece's: Llama 2 and Phi-3 (a normaliser puts a blank before), Mistral, Gemma (nothing)."""
    special = [added("<unk>"), added("<s>"), added("</s>", rstrip=True), added("<|user|>", rstrip=True)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "\u2581")
    learned.train_from_iterator(_SENTENCES, trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prepend == "normaliser":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    elif prepend == "none":
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(special)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, trimmed offsets": lambda: byte_level(trims=True),
    "byte level, NFC": lambda: byte_level(nfc=True),
    "byte level, white space taken along": lambda: byte_level(rstrip=True),
    "blanks, put in by a normaliser": lambda: with_blanks("normaliser"),
    "blanks, always put in": lambda: with_blanks("always"),
    "blanks, put in first": lambda: with_blanks("first"),
    "blanks, never put in": lambda: with_blanks("never"),
    "blanks, replaced only": lambda: with_blanks("none"),
}

_BUILT: dict[str, tuple[Tokenizer, Spans]] = {}


def built(kind: str) -> tuple[Tokenizer, Spans]:
    if kind not in _BUILT:
        tokenizer = KINDS[kind]()
        spans = Spans.of(json.loads(tokenizer.to_str()))
        assert spans is not None, kind
        _BUILT[kind] = tokenizer, spans
    return _BUILT[kind]


@st.composite
def marked_texts(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    pieces = st.one_of(st.sampled_from(_PIECES), st.text(max_size=4).filter(is_unicode))
    text = "".join(draw(st.lists(pieces, min_size=1, max_size=16))) or "\u0130"
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=4)))
    return text, [(cuts[n], cuts[n + 1]) for n in range(0, len(cuts) - 1, 2)]


def is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def assert_equal(tokenizer: Tokenizer, spans: Spans, text: str, learned: list[tuple[int, int]]) -> bool:
    """Whether the sums told it."""
    slow = tokenizer.encode_batch([text], add_special_tokens=False)[0]
    fast = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
    assert fast.ids == slow.ids
    mask = spans.mask(np.array(fast.ids, np.int32), text, learned)
    if mask is not None:
        expected = mask_tokens(slow.offsets, learned)
        assert mask.tolist() == expected, list(zip(slow.tokens, slow.offsets, strict=True))
    return mask is not None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=marked_texts())
def test_sums_of_lengths_tell_what_offsets_tell(kind: str, case: tuple[str, list[tuple[int, int]]]) -> None:
    assert_equal(*built(kind), *case)


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_needs_no_offsets(kind: str) -> None:
    text = "<|user|>\nHow are you?  Größe 日本 🙂\n\n<|end|>It's 12. Fine!<|im_end|>\n"
    start, end = text.index("It's"), text.index("<|im_end|>")
    assert assert_equal(*built(kind), text, [(start, end)])


@pytest.mark.shared
@pytest.mark.skipif(not PHI3.is_dir(), reason="the Phi-3 tokenizer does not lie beside the checkout")
@settings(max_examples=200, deadline=None)
@given(case=marked_texts())
def test_sums_of_lengths_tell_what_the_phi3_tokenizers_offsets_tell(
    case: tuple[str, list[tuple[int, int]]],
) -> None:
    if "phi3" not in _BUILT:
        tokenizer = Tokenizer.from_file(str(PHI3 / "tokenizer.json"))
        spans = Spans.of(json.loads(tokenizer.to_str()))
        assert spans is not None
        _BUILT["phi3"] = tokenizer, spans
    assert_equal(*_BUILT["phi3"], *case)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.1}},
    ],
)
def test_a_tokenizer_of_another_kind_is_left_to_its_offsets(change: dict[str, Any]) -> None:
    described = json.loads(built("byte level")[0].to_str())
    assert Spans.of(described) is not None
    assert Spans.of({**described, **change}) is None


def test_a_mark_that_ends_between_the_spaces_of_a_token_goes_by_trimmed_offsets() -> None:
    # One token of two spaces, of which the answer has the first: its trimmed offsets are the second's.
    tokenizer = Tokenizer.from_str(built("byte level, trimmed offsets")[0].to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary["ĠĠ"] = max(vocabulary.values()) + 1
    described["model"]["merges"] = [["Ġ", "Ġ"]]
    tokenizer, spans = Tokenizer.from_str(json.dumps(described)), Spans.of(described)
    assert spans is not None
    assert tokenizer.encode("a  b", add_special_tokens=False).offsets == [(0, 1), (3, 3), (3, 4)]
    assert spans.mask(np.array(tokenizer.encode("a  b").ids, np.int32), "a  b", [(0, 2)]) is None
    assert assert_equal(tokenizer, spans, "a  b", [(0, 3)])


def test_ids_that_do_not_spell_the_text_are_not_believed() -> None:
    tokenizer, spans = built("byte level")
    ids = np.array(tokenizer.encode("The capital", add_special_tokens=False).ids, np.int32)
    assert spans.mask(ids, "The capital", [(0, 3)]) is not None
    assert spans.mask(ids[:-1], "The capital", [(0, 3)]) is None
    assert spans.mask(ids, "The capital!", [(0, 3)]) is None


# ---------------------------------------------------------------- whole conversations


@pytest.fixture(scope="module", params=["smollm2", "llama", "phi3", "gemma3", "mistral"])
def tokenize(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenize:
    folder = tiny_tokenizer(tmp_path_factory.mktemp(request.param), request.param)
    backend = Backend((folder / "tokenizer.json").read_text(encoding="utf-8"), (), 4096)
    made = Tokenize.__new__(Tokenize)
    made.__setstate__((backend, ChatTemplate.from_folder(folder), 4096, "error"))
    return made


contents = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=8).map("".join).filter(lambda t: t.strip())


@settings(max_examples=60, deadline=None)
@given(talk=st.lists(st.tuples(contents, contents), min_size=1, max_size=4))
def test_a_conversation_has_the_ids_and_the_marks_of_the_definition(
    tokenize: Tokenize, talk: list[tuple[str, str]]
) -> None:
    messages = [
        {"role": role, "content": text}
        for turn in talk
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    ((_, found),) = tokenize([Row(1, 1, {"messages": messages})])
    rendered = tokenize.template.segments(messages)
    (expected,) = tokenize._by_offsets([rendered])
    assert [each.input_ids.tolist() for each in found] == [expected.input_ids.tolist()]
    assert [each.learn.tolist() for each in found] == [expected.learn.tolist()]


@settings(max_examples=60, deadline=None)
@given(talk=st.lists(st.tuples(contents, contents), min_size=1, max_size=4))
def test_the_frame_of_the_roles_tells_the_spans_that_placeholders_tell(
    tokenize: Tokenize, talk: list[tuple[str, str]]
) -> None:
    template: ChatTemplate = tokenize.template
    messages = [
        {"role": role, "content": text}
        for turn in talk
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    text = template.render(messages)
    by_frame = template._spans_by_frame(messages, text)
    if by_frame is not None:
        assert by_frame == template._spans_by_placeholders(messages, text)
