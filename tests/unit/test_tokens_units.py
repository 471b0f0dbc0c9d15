"""Ids put together from remembered words are the tokenizer's own, or there are no units."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.unit.test_tokens_spans import KINDS, PHI3, added, is_unicode, with_blanks
from tuneloop.tokens import units
from tuneloop.tokens.units import PATTERNS, Units

_SENTENCES = [
    "A recipe holds the base model, the data and every number of a run. It's 2026! We'LL see (b) x=1",
    "Größe und Maß, naïve café, 日本語 текст 🙂 e\u0301  two  spaces   three",
    "    indented\n\n\ncode\t= 12 + 3.4 \n \r\n next/line\n/ /a \t b",
    # Tokens of several kinds of white space, which a cut between them would miss.
    "x\u3000 \n\u3000 \n\u3000 \n x\xa0 \n\xa0 \n\xa0 \n x\x85 \n\x85 \n",
] * 8

_PIECES = [
    *(
        "a",
        "The",
        "capital",
        "hello",
        "'s",
        "'LL",
        "!?",
        "12",
        "3.4",
        "é",
        "日",
        "🙂",
        "e\u0301",
        "\u0301",
        "ﬁ",
    ),
    *(
        " ",
        " ",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\x0b",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u3000",
        "\u200b",
        "/",
    ),
    *("\u2581", "\u2581\u2581", "<0x0A>", "\u180e", "\u2028", "\u0130", "ǅ", "٣", "½", "\ufeff", "\x00"),
    *("<|im_end|>", "<|user|>", "<|end|>", "<s>", "</s>", "<unk>", "<|im_end", "|>"),
]


def split_by(pattern: str, *, nfc: bool = False) -> Tokenizer:
    """As Llama 3, Qwen 2, Phi-4: a pattern of their own, then bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[added("<|im_end|>"), added("<|user|>", rstrip=True), added("<|end|>", lstrip=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def with_words(prepend: bool) -> Tokenizer:
    """As Llama 2 and Phi-3 (a normaliser puts a blank before) and Gemma (nothing does): no token reaches from
    one word into the next."""
    special = [added("<unk>"), added("<s>"), added("</s>", rstrip=True), added("<|user|>", rstrip=True)]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "\u2581")
    learned.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    learned.train_from_iterator(_SENTENCES, trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prepend else replace
    )
    if not prepend:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(special)
    return tokenizer


WITH_UNITS: dict[str, Callable[[], Tokenizer]] = {
    **{name: make for name, make in KINDS.items() if name.startswith("byte level")},
    "blanks, put in by a normaliser": lambda: with_words(prepend=True),
    "blanks, replaced only": lambda: with_words(prepend=False),
    **{
        f"pattern {number}": lambda pattern=pattern, number=number: split_by(pattern, nfc=number % 2 == 0)
        for number, pattern in enumerate(sorted(PATTERNS))
    },
}
_BUILT: dict[str, tuple[Tokenizer, Units]] = {}


def built(kind: str) -> tuple[Tokenizer, Units]:
    if kind not in _BUILT:
        tokenizer = (
            Tokenizer.from_file(str(PHI3 / "tokenizer.json")) if kind == "phi3" else WITH_UNITS[kind]()
        )
        found = Units.of(json.loads(tokenizer.to_str()), tokenizer)
        assert found is not None, kind
        _BUILT[kind] = tokenizer, found
    return _BUILT[kind]


def texts() -> st.SearchStrategy[str]:
    pieces = st.one_of(st.sampled_from(_PIECES), st.text(max_size=4).filter(is_unicode))
    return st.lists(pieces, max_size=20).map("".join)


def assert_equal(kind: str, written: list[str]) -> None:
    tokenizer, found = built(kind)
    expected = [each.ids for each in tokenizer.encode_batch_fast(written, add_special_tokens=False)]
    assert [ids.tolist() for ids in found.encode(written)] == expected


@pytest.mark.parametrize("kind", WITH_UNITS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(written=st.lists(texts(), min_size=1, max_size=3))
def test_ids_are_those_of_the_tokenizer(kind: str, written: list[str]) -> None:
    assert_equal(kind, written)


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_every_pair_of_pieces_around_a_space_is_cut_as_the_tokenizer_cuts_it(kind: str) -> None:
    assert_equal(kind, [f"x{one} {other}y" for one in _PIECES for other in _PIECES])


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_a_space_between_other_white_space_is_not_cut_off(kind: str) -> None:
    spaces = [piece for piece in _PIECES if piece.isspace()]
    assert_equal(
        kind, [f"x{one} {other}y" + tail for one in spaces for other in spaces for tail in ("", " z")]
    )


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_an_emptied_memory_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MOST_CHARACTERS", 5)
    for text in [*_SENTENCES[:3], *_SENTENCES[:3]]:
        assert_equal(kind, [text])
        # What was remembered before the last text is gone.
        assert built(kind)[1]._characters <= len(text)


@pytest.mark.shared
@pytest.mark.skipif(not PHI3.is_dir(), reason="the Phi-3 tokenizer does not lie beside the checkout")
@settings(max_examples=300, deadline=None)
@given(written=st.lists(texts(), min_size=1, max_size=3))
def test_ids_are_those_of_the_phi3_tokenizer(written: list[str]) -> None:
    assert_equal("phi3", written)


def test_a_word_is_given_to_the_tokenizer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = WITH_UNITS["byte level"]()
    found = Units.of(json.loads(tokenizer.to_str()), tokenizer)
    assert found is not None
    asked: list[str] = []
    ask = found._ask
    monkeypatch.setattr(found, "_ask", lambda words: asked.extend(words) or ask(words))
    found.encode(["the cat<|im_end|> the cat", "the dog"])
    found.encode(["the cat"])
    assert sorted(asked) == [" cat", " dog", " the", "the"]


def described(kind: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(built(kind)[0].to_str()), **changes}


def test_a_vocabulary_that_reaches_across_a_blank_has_no_units() -> None:
    reaching, model = with_blanks("normaliser"), described("blanks, put in by a normaliser")
    assert Units.of(json.loads(reaching.to_str()), reaching) is None
    model["model"]["vocab"]["a\u2581b"] = 100_000
    assert Units.of(model, reaching) is None


@pytest.mark.parametrize(
    "before",
    [
        [{"type": "Split", "pattern": {"Regex": r"\w+ \w+"}, "behavior": "Isolated", "invert": False}],
        [{"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}],
        [{"type": "Punctuation", "behavior": "Isolated"}],
    ],
)
def test_a_pattern_that_nobody_looked_through_has_no_units(before: list[dict[str, Any]]) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    changed = described("pattern 0", pre_tokenizer={"type": "Sequence", "pretokenizers": [*before, level]})
    assert Units.of(changed, built("pattern 0")[0]) is None


def test_added_tokens_that_are_looked_for_in_changed_text_have_no_units() -> None:
    changed = described("byte level, NFC")
    changed["added_tokens"] = [{**each, "normalized": True} for each in changed["added_tokens"]]
    assert Units.of(changed, built("byte level, NFC")[0]) is None
