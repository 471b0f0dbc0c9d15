"""Bodies of Azure's requests: what is read, what is refused by name, and that nothing is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from tuneloop.server.azure.bodies import Body, duration, duration_seconds, strings
from tuneloop.server.azure.errors import Refusal


def refusal(body: Body, *, is_loose: bool = False) -> Refusal:
    with pytest.raises(Refusal) as caught:
        body.finish(is_loose=is_loose)
    assert caught.value.status == 400
    return caught.value


def mistakes(body: Body) -> dict[str, str]:
    return {one.target: one.message for one in refusal(body).mistakes}


def test_what_was_read_and_what_says_nothing_is_no_mistake() -> None:
    body = Body({"name": "x", "a": None, "b": {}, "c": []})
    assert body.text("name") == "x"
    assert body.finish(is_loose=False) == ()


def test_a_field_that_nobody_read_is_refused_by_its_whole_name() -> None:
    body = Body({"properties": {"identity": {"type": "x"}, "sku": 3}})
    body.object("properties").object("identity")
    found = refusal(body)
    assert found.code == "NotSupported"
    assert found.target == "properties.sku"
    assert [one.target for one in found.mistakes] == ["properties.sku", "properties.identity.type"]
    assert "would be ignored here, so it is refused" in found.message


def test_loose_makes_a_warning_of_what_nobody_read_and_of_nothing_else() -> None:
    body = Body({"sku": 3})
    assert body.finish(is_loose=True) == ("sku has no effect here.",)
    wrong = Body({"sku": 3, "name": 7})
    wrong.text("name")
    assert [one.target for one in refusal(wrong, is_loose=True).mistakes] == ["name"]


def test_all_mistakes_are_told_at_once() -> None:
    body = Body({"name": 1, "count": "many", "on": "yes", "wait": "90", "tags": {"a": 1}, "kind": "z"})
    body.text("name")
    body.number("count")
    body.flag("on")
    body.seconds("wait")
    body.texts("tags")
    body.text("kind", choices=("Key", "AADToken"))
    assert mistakes(body) == {
        "name": "is 1; expected a text.",
        "count": "is 'many'; expected a whole number.",
        "on": "is 'yes'; expected true or false.",
        "wait": "is '90'; expected an ISO 8601 duration such as PT1M30S.",
        "tags.a": "is 1; expected a text.",
        "kind": "is 'z'; expected one of: Key, AADToken.",
    }


@pytest.mark.parametrize("value", [[], "x", 3, None, True])
def test_a_body_that_is_no_object_is_refused(value: Any) -> None:
    assert refusal(Body(value)).code == "InvalidRequestContent"


@pytest.mark.parametrize(
    ("value", "said"),
    [(True, "whole number"), (1.0, "whole number"), (0, "1 or more"), (99, "1 to 8"), (-1, "1 or more")],
)
def test_numbers_are_whole_and_within_their_limits(value: Any, said: str) -> None:
    body = Body({"count": value})
    body.number("count", least=1, most=8 if value == 99 else None)
    assert said in mistakes(body)["count"]


def test_choices_match_whatever_their_case_and_come_back_as_listed() -> None:
    assert Body({"a": "KEY"}).text("a", choices=("Key", "AADToken")) == "Key"


def test_a_field_with_one_value_takes_that_and_refuses_others_with_the_reason() -> None:
    body = Body({"authMode": "aadtoken", "scale": "Default"})
    body.expect("scale", "default", why="there is no other scale.")
    body.expect("authMode", "Key", why="only keys are taken here.")
    found = refusal(body)
    assert (found.code, found.target) == ("NotSupported", "authMode")
    assert found.message == "authMode is 'aadtoken': only keys are taken here."


def test_true_is_not_one() -> None:
    body = Body({"a": True})
    body.expect("a", 1, why="no.")
    assert "a" in mistakes(body)


def test_what_does_nothing_is_a_warning_unless_it_says_what_is_done_anyway() -> None:
    body = Body({"instanceType": "Standard_NC6s_v3", "tier": "Dedicated"})
    body.without_effect("instanceType", "replicas run on this machine.")
    body.without_effect("tier", "there is one.", "dedicated")
    assert body.finish(is_loose=False) == (
        "instanceType is 'Standard_NC6s_v3': replicas run on this machine.",
    )


def test_objects_of_objects_have_their_names_in_what_is_told() -> None:
    body = Body({"jobs": {"one": {"type": 3}, "two": []}})
    for _, inner in body.objects("jobs"):
        inner.text("type")
    assert set(mistakes(body)) == {"jobs.one.type", "jobs.two"}


def test_long_values_are_not_repeated_whole() -> None:
    body = Body({"a": ["x" * 10_000]})
    body.text("a")
    assert len(refusal(body).message) < 200


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("PT1M30S", 90.0),
        ("PT10M", 600.0),
        ("P1D", 86_400.0),
        ("P1DT2H", 93_600.0),
        ("PT0.5S", 0.5),
        ("PT0S", 0.0),
    ],
)
def test_durations_are_read_and_written_as_iso_8601(text: str, seconds: float) -> None:
    assert duration_seconds(text) == seconds
    assert duration_seconds(duration(seconds)) == seconds


@pytest.mark.parametrize("value", ["", "P", "PT", "P1DT", "90", "1M", "PT-1S", "PT1M30", 90, None, "P1Y"])
def test_what_is_no_duration_is_none(value: object) -> None:
    assert duration_seconds(value) is None


def test_properties_are_texts() -> None:
    assert strings({"a": 1, "b": "x", "c": None, "d": True}) == {"a": "1", "b": "x", "d": "True"}
