"""One chat template: rendering equals transformers', and what is learned is the answers and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import FAMILIES, MORE_FAMILIES, TEMPLATES, TOKENS, Family, tiny_tokenizer
from tuneloop.core.chat import ChatTemplate, mask_tokens
from tuneloop.core.errors import DataError, ModelUnavailable, Unsupported

SHARED = Path(__file__).parents[3] / "shared" / "data"

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Paris? "},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "And Lyon?"},
    {"role": "assistant", "content": "In France, too. 🙂"},
]
AWKWARD = [
    {"role": "user", "content": "say it"},
    {"role": "assistant", "content": " it\n"},
    {"role": "user", "content": "it"},
    {"role": "assistant", "content": "say it"},
    {"role": "assistant", "content": "say it"},
]

QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learned_texts(template: ChatTemplate, messages: list[dict[str, str]]) -> list[str]:
    rendered = template.segments(messages)
    return [rendered.text[start:end] for start, end in rendered.learned]


def their_tokenizer(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / request.param, request.param)


FAMILY_FACTS = {
    "llama3.1": ("In France.<|eot_id|>", "<|eot_id|>"),
    "gemma3": ("In France.<end_of_turn>", "<end_of_turn>"),
    "mistral": (" In France.</s>", "</s>"),
    "qwen3": ("<think>\n\n</think>\n\nIn France.<|im_end|>", "<|im_end|>"),
    "phi3-medium": ("In France.<|end|>", "<|end|>"),
    "phi4": ("In France.<|im_end|>", "<|im_end|>"),
    "phi4-mini": ("In France.<|end|>", "<|end|>"),
}
"""What a model of the family has to write as a last answer, and how it ends a turn."""


@pytest.fixture(params=MORE_FAMILIES)
def other_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / request.param, request.param)


# ---------------------------------------------------------------- rendering


@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[:2], TALK[1:3]])
@pytest.mark.parametrize("opens", [False, True])
def test_rendering_of_every_family_of_the_catalogue_equals_transformers(
    other_folder: Path, messages: list, opens: bool
) -> None:
    template = ChatTemplate.from_folder(other_folder)
    theirs = their_tokenizer(other_folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opens
    )
    assert template.render(messages, add_generation_prompt=opens) == theirs


def test_every_family_of_the_catalogue_learns_the_answer_and_its_end(other_folder: Path) -> None:
    template = ChatTemplate.from_folder(other_folder)
    learned, marker = FAMILY_FACTS[other_folder.name]
    assert template.end_of_turn.strip() == marker
    assert learned_texts(template, TALK[1:3]) == [learned]
    both = learned_texts(template, TALK[1:])
    assert [text.removeprefix("<think>\n\n</think>\n\n").strip() for text in both] == [
        f"In France.{marker}",
        f"In France, too. 🙂{marker}",
    ]


def test_a_system_message_is_learned_around_or_refused(other_folder: Path) -> None:
    template = ChatTemplate.from_folder(other_folder)
    if other_folder.name == "phi3-medium":
        # Its template has no place for one, and a row that is cut in silence would teach something else.
        with pytest.raises(DataError, match=r"leaves messages\[0\] out.*no place for the role 'system'"):
            template.segments(TALK)
        return
    assert "Be brief." in template.render(TALK)
    assert not any("Be brief." in text for text in learned_texts(template, TALK))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_family_whose_turns_must_alternate_says_so(tmp_path: Path, family: Family) -> None:
    template = ChatTemplate.from_folder(tiny_tokenizer(tmp_path, family))
    with pytest.raises(DataError, match="take turns"):
        template.segments(AWKWARD)


def test_the_date_of_llama_is_known_to_be_written(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tiny_tokenizer(tmp_path, "llama3.1")).writes_date


@pytest.mark.parametrize("messages", [TALK, TALK[1:], AWKWARD, TALK[:2]])
@pytest.mark.parametrize("opens", [False, True])
def test_rendering_equals_apply_chat_template(family_folder: Path, messages: list, opens: bool) -> None:
    ours = ChatTemplate.from_folder(family_folder).render(messages, add_generation_prompt=opens)
    theirs = their_tokenizer(family_folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opens
    )
    assert ours == theirs


@pytest.mark.parametrize("source", [QWEN3, MISTRAL, MARKED])
def test_rendering_of_other_styles_equals_apply_chat_template(source: str, tmp_path: Path) -> None:
    tokenizer = their_tokenizer(tiny_tokenizer(tmp_path, "llama"))
    template = ChatTemplate(source, tokenizer.special_tokens_map)
    theirs = tokenizer.apply_chat_template(TALK[1:], tokenize=False, chat_template=source)
    assert template.render(TALK[1:]) == theirs


def test_template_environment_offers_what_transformers_offers(tmp_path: Path) -> None:
    source = (
        "{% set ns = namespace(total=0) %}{% for message in messages %}"
        "{% if loop.index0 == 1 %}{% continue %}{% endif %}"
        "{% set ns.total = ns.total + 1 %}{% if ns.total > 2 %}{% break %}{% endif %}"
        "{{ message | tojson }} {{ {'b': '<é>'} | tojson(indent=1) }} {{ dict(a=1) }} {{ tools is none }}\n"
        "{% endfor %}{{ documents is none }} {{ strftime_now('%Y') }}"
    )
    tokenizer = their_tokenizer(tiny_tokenizer(tmp_path, "llama"))
    theirs = tokenizer.apply_chat_template(TALK, tokenize=False, chat_template=source)
    assert ChatTemplate(source, tokenizer.special_tokens_map).render(TALK) == theirs


def test_keys_without_a_value_count_as_absent() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.name is defined }}{% endfor %}")
    assert template.render([{"role": "user", "content": "x", "name": None}]) == "False"


def test_template_cannot_leave_the_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(DataError):
        template.render(TALK)


def test_template_with_a_syntax_error_is_refused_by_origin() -> None:
    with pytest.raises(Unsupported, match=r"the template of model X is not a template that can be run"):
        ChatTemplate("{% for %}", origin="the template of model X").render(TALK)


def test_refusal_carries_the_words_of_the_template() -> None:
    with pytest.raises(DataError, match="Conversation roles must alternate"):
        ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}).render(TALK)


# ---------------------------------------------------------------- learned spans


@pytest.mark.parametrize(
    ("family", "marker"),
    [("smollm2", "<|im_end|>"), ("qwen2", "<|im_end|>"), ("llama", "<|eot_id|>"), ("phi3", "<|end|>")],
)
def test_answers_and_end_markers_are_learned(family: str, marker: str) -> None:
    template = ChatTemplate(TEMPLATES[family], TOKENS[family])
    assert template.end_of_turn == marker
    assert learned_texts(template, TALK) == [f"In France.{marker}", f"In France, too. 🙂{marker}"]


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "phi3"])
def test_spaces_at_the_ends_of_an_answer_are_learned_where_the_template_keeps_them(family: str) -> None:
    template = ChatTemplate(TEMPLATES[family], TOKENS[family])
    marker = template.end_of_turn
    assert learned_texts(template, AWKWARD) == [f" it\n{marker}", f"say it{marker}", f"say it{marker}"]


def test_a_trimming_template_is_followed() -> None:
    template = ChatTemplate(TEMPLATES["llama"], TOKENS["llama"])
    assert learned_texts(template, AWKWARD)[0] == "it<|eot_id|>"


def test_an_answer_that_spells_the_end_marker_is_learned_to_its_own_end() -> None:
    template = ChatTemplate(TEMPLATES["smollm2"], TOKENS["smollm2"])
    talk = [
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "it is <|im_end|> so"},
    ]
    assert learned_texts(template, talk) == ["it is <|im_end|> so<|im_end|>"]


def test_what_stands_between_prompt_and_last_answer_is_learned() -> None:
    template = ChatTemplate(QWEN3, {"eos_token": "<|im_end|>"})
    assert learned_texts(template, TALK) == [
        "In France.<|im_end|>",
        "<think>\n\n</think>\n\nIn France, too. 🙂<|im_end|>",
    ]


def test_answers_that_the_template_rewrites_are_found_from_the_prompts() -> None:
    template = ChatTemplate(QWEN3, {"eos_token": "<|im_end|>"})
    talk = [
        TALK[1],
        {"role": "assistant", "content": "<think>\nlong ago\n</think>\n\nIn France."},
        TALK[3],
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nToo."},
    ]
    assert learned_texts(template, talk) == [
        "In France.<|im_end|>",
        "<think>\nhm\n</think>\n\nToo.<|im_end|>",
    ]


def test_a_template_without_generation_prompt_learns_the_space_that_the_model_writes() -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    assert learned_texts(template, TALK[1:]) == [" In France.</s>", " In France, too. 🙂</s>"]


def test_generation_marks_of_a_template_decide() -> None:
    rendered = ChatTemplate(MARKED).segments(TALK)
    assert [rendered.text[a:b] for a, b in rendered.learned] == [
        "In France.<|im_end|>",
        "In France, too. 🙂<|im_end|>",
    ]
    assert rendered.text == ChatTemplate(MARKED).render(TALK)


def test_a_template_without_line_breaks_has_its_marker_told_from_what_follows() -> None:
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    template = ChatTemplate(source, {"eos_token": "<|endoftext|>"})
    assert template.end_of_turn == "<|end|>"
    assert learned_texts(template, TALK)[1] == "In France, too. 🙂<|end|>"


def test_a_template_that_writes_no_marker_is_known_for_it() -> None:
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert ChatTemplate(source).end_of_turn == ""


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    source = TEMPLATES["phi3"].replace("'system'", "'nobody'")
    with pytest.raises(DataError, match=r"leaves messages\[0\] out: it has no place for the role 'system'"):
        ChatTemplate(source, TOKENS["phi3"]).segments(TALK)


def test_answers_that_cannot_be_found_are_refused() -> None:
    source = "{% for m in messages %}{{ m.role + ': ' + m.content | upper + '<end>' }}{% endfor %}"
    talk = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(Unsupported):
        ChatTemplate(source).segments(talk)


def test_a_template_that_drops_the_answer_is_refused() -> None:
    with pytest.raises(Unsupported, match="does not write out the assistant's answer"):
        ChatTemplate("{{ messages[0]['content'] }}").end_of_turn  # noqa: B018


# ---------------------------------------------------------------- tokens


def test_learned_tokens_spell_the_answers(family_folder: Path) -> None:
    template = ChatTemplate.from_folder(family_folder)
    tokenizer = their_tokenizer(family_folder)
    rendered = template.segments(TALK)
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == tokenizer.apply_chat_template(TALK)["input_ids"]
    mask = mask_tokens(encoded["offset_mapping"], rendered.learned)
    kept = [token for token, is_learned in zip(encoded["input_ids"], mask, strict=True) if is_learned]
    assert tokenizer.decode(kept) == "".join(learned_texts(template, TALK))


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "phi3_tokenizer").is_dir(), reason="no shared data beside the checkout")
def test_learned_tokens_of_the_phi3_tokenizer_are_the_answers() -> None:
    folder = SHARED / "phi3_tokenizer"
    template = ChatTemplate.from_folder(folder)
    tokenizer = their_tokenizer(folder)
    rendered = template.segments(TALK)
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == tokenizer.apply_chat_template(TALK)["input_ids"]
    mask = mask_tokens(encoded["offset_mapping"], rendered.learned)
    kept = [token for token, is_learned in zip(encoded["input_ids"], mask, strict=True) if is_learned]
    assert tokenizer.convert_ids_to_tokens(kept[:5]) == ["▁In", "▁France", ".", "<|end|>", "▁In"]
    assert tokenizer.convert_ids_to_tokens(kept[-1]) == "<|end|>"
    assert kept.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2
    assert tokenizer.eos_token_id not in kept


def test_a_token_over_the_edge_of_a_span_counts() -> None:
    assert mask_tokens([(0, 2), (2, 5), (5, 8), (8, 9)], [(4, 6)]) == [False, True, True, False]


def test_tokens_of_spaces_with_trimmed_offsets_belong_to_what_they_follow() -> None:
    assert mask_tokens([(0, 0), (3, 3), (3, 5), (7, 7), (8, 8)], [(3, 7)]) == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_no_token_counts_without_a_span() -> None:
    assert mask_tokens([(0, 1), (1, 2)], []) == [False, False]


# ---------------------------------------------------------------- digest and folders


def test_digest_changes_with_the_source_and_with_the_tokens_that_it_uses() -> None:
    phi3 = ChatTemplate(TEMPLATES["phi3"], TOKENS["phi3"])
    assert phi3.digest == ChatTemplate(TEMPLATES["phi3"], dict(TOKENS["phi3"])).digest
    assert phi3.digest != ChatTemplate(TEMPLATES["phi3"] + " ", TOKENS["phi3"]).digest
    assert phi3.digest != ChatTemplate(TEMPLATES["phi3"], {**TOKENS["phi3"], "eos_token": "</s>"}).digest


def test_digest_does_not_change_with_tokens_that_the_source_never_writes() -> None:
    phi3 = ChatTemplate(TEMPLATES["phi3"], TOKENS["phi3"])
    assert phi3.digest == ChatTemplate(TEMPLATES["phi3"], {**TOKENS["phi3"], "pad_token": "<pad>"}).digest


def test_from_folder_reads_a_template_in_the_tokenizer_config(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path, "phi3")
    before = ChatTemplate.from_folder(folder).digest
    source = (folder / "chat_template.jinja").read_text()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": config["eos_token"], "special": True}
    config["chat_template"] = [{"name": "default", "template": source}, {"name": "other", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink()
    assert ChatTemplate.from_folder(folder).digest == before


def test_from_folder_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"neither chat_template\.jinja nor 'chat_template'"):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_with_a_date_is_known_for_it() -> None:
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}").writes_date
    assert not ChatTemplate(TEMPLATES["llama"]).writes_date


# ---------------------------------------------------------------- weights


WEIGHTED = [
    TALK[1],
    {**TALK[2], "weight": 0},
    TALK[3],
    {**TALK[4], "weight": 1},
]


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_an_answer_of_weight_zero_is_in_the_text_and_not_learned(family: Family) -> None:
    template = ChatTemplate(TEMPLATES[family], TOKENS[family], family)
    plain = template.segments(TALK[1:])
    weighted = template.segments(WEIGHTED)
    assert weighted.text == plain.text
    assert weighted.learned == plain.learned[1:]


def test_answers_of_weight_one_are_learned_as_those_without() -> None:
    template = ChatTemplate(TEMPLATES["qwen2"], TOKENS["qwen2"])
    heavy = [{**message, "weight": 1} for message in TALK]
    assert template.segments(heavy) == template.segments(TALK)


def test_a_template_never_sees_a_weight() -> None:
    source = "{% for m in messages %}{{ m.keys() | sort | join(',') }}:{{ m.content }};{% endfor %}"
    text = ChatTemplate(source).render([{**TALK[1], "weight": 0, "name": "Ann"}])
    assert text.startswith("content,name,role:")


WITH_PLACE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}%ANSWER%{% else %}"
    "<{{ m.content }}>{% endif %}{% endfor %}"
)


def test_weights_go_with_the_marks_of_a_template() -> None:
    source = WITH_PLACE.replace("%ANSWER%", "{% generation %}{{ m.content }}{% endgeneration %}")
    rendered = ChatTemplate(source).segments(WEIGHTED)
    assert [rendered.text[start:end] for start, end in rendered.learned] == [TALK[4]["content"]]


def test_a_template_with_two_marks_for_an_answer_cannot_be_weighted() -> None:
    twice = "{% generation %}a{% endgeneration %}{% generation %}{{ m.content }}{% endgeneration %}"
    template = ChatTemplate(WITH_PLACE.replace("%ANSWER%", twice))
    assert len(template.segments(TALK).learned) == 4
    with pytest.raises(Unsupported, match="4 spans for 2 answers"):
        template.segments(WEIGHTED)
