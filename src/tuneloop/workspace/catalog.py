"""The catalogue of base models: the cards that ship, and those that a person added or pointed elsewhere.

A card is YAML with the fields of `core.types.Card`. Shipped cards are read when they are first asked for; a
person's card of the same name and version stands in front of a shipped one. Names match case-insensitively.
"""

from __future__ import annotations

import builtins
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from tuneloop.core.errors import AlreadyExists, InvalidName, NotFound, UsageError
from tuneloop.core.names import check_name, check_version, did_you_mean
from tuneloop.core.ports import Clock, Store
from tuneloop.core.recipe.lined import Document, Mistake, mistakes_of, read, refuse
from tuneloop.core.recipe.lined import Path as Place
from tuneloop.core.recipe.resolve import defaults_of
from tuneloop.core.types import (
    Architecture,
    Card,
    CardRecord,
    FolderSource,
    HubSource,
    Noun,
    PackageSource,
)

CARDS = Path(__file__).parent.parent / "cards"
"""The cards that ship."""

LATEST = "latest"

_SOURCES: dict[str, type[Noun]] = {"package": PackageSource, "hub": HubSource, "folder": FolderSource}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]*(?<!/)")
_ASSET = re.compile(
    r"azureml://registries/[^/]+/models/(?P<name>[^/]+)/(?:versions|labels)/(?P<version>[^/]+)"
)


class Catalog:
    """Base models by name and version."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def list(self, task: str | None = None) -> list[Card]:
        """The latest version of each model, by name."""
        newest: dict[str, Card] = {}
        for card in self._all():
            known = newest.get(card.name.lower())
            if known is None or _age(card.version) > _age(known.version):
                newest[card.name.lower()] = card
        found = [newest[name] for name in sorted(newest)]
        return [card for card in found if task is None or card.task == task]

    def find(self, name: str) -> Card | None:
        """By `Name`, `Name:version`, `Name:latest`, Azure's asset id, or the repository of a hub source."""
        wanted, version = _split(name)
        return _choose(self._versions(wanted), version)

    def get(self, name: str) -> Card:
        """Like `find`; raises `NotFound`, naming the nearest, and `UsageError` for a repository of several
        models."""
        wanted, version = _split(name)
        versions = self._versions(wanted)
        names = sorted({card.name for card in versions}, key=str.lower)
        if len({name.lower() for name in names}) > 1:
            raise UsageError(
                f"Several base models come from the repository '{wanted}': {', '.join(names)}.",
                next_move="Write the name of one of them.",
            )
        found = _choose(versions, version)
        if found is not None:
            return found
        if versions:
            known = ", ".join(card.version for card in versions)
            raise NotFound(
                f"There is no version '{version}' of {versions[0].name}.", next_move=f"There is: {known}."
            )
        if _REPOSITORY.fullmatch(wanted):
            raise NotFound(
                f"No base model in the catalogue comes from the repository '{wanted}'.",
                next_move="Write a card with a hub source for it and add it: tuneloop catalog add card.yaml",
            )
        raise NotFound(
            f"There is no base model '{wanted}' in the catalogue.",
            next_move=did_you_mean(wanted, {card.name for card in self._all()})
            or "See: tuneloop catalog list. Add one with: tuneloop catalog add card.yaml",
        )

    def versions(self, name: str) -> builtins.list[Card]:
        """Of one base model, oldest first; raises `NotFound`, naming the nearest."""
        return self._versions(self.get(name).name)

    def add(self, text: str, path: str = "card") -> Card:
        """Take in a card; the same card again is no error. Raises `UsageError` with all of its mistakes, and
        `AlreadyExists` for another card of the same name and version."""
        card = read_card(text, path)
        with self._store.transaction():
            known = _choose(self._versions(card.name), card.version)
            if known == card:
                return card
            if known is not None:
                raise AlreadyExists(
                    f"There is a card {known.name}:{known.version} already.",
                    next_move="Give yours another version.",
                )
            self._store.insert(CardRecord(created_at=self._clock.now(), card=card))
        return card

    def use(self, name: str, folder: str | Path) -> Card:
        """Take the weights of a model from a folder of this machine, before any other source."""
        card = self.get(name)
        source = FolderSource(path=str(_model_folder(Path(folder))))
        others = tuple(known for known in card.sources if not isinstance(known, FolderSource))
        changed = card.model_copy(update={"sources": (source, *others)})
        record = CardRecord(created_at=self._clock.now(), card=changed)
        with self._store.transaction():
            stored = self._store.find(CardRecord, record.key)
            if stored is None:
                self._store.insert(record)
            else:
                self._store.update(stored.model_copy(update={"card": changed}))
        return changed

    def _versions(self, name: str) -> builtins.list[Card]:
        """Oldest first. A name with a slash is a repository of the hub."""
        if "/" in name:
            return [card for card in self._all() if name.lower() in _repositories(card)]
        return [card for card in self._all() if card.name.lower() == name.lower()]

    def _all(self) -> builtins.list[Card]:
        """Every version of every model, a person's cards in front of shipped ones; oldest first."""
        cards = {_key(card): card for card in shipped_cards()}
        cards.update((record.key, record.card) for record in self._store.list(CardRecord))
        return sorted(cards.values(), key=lambda card: (card.name.lower(), _age(card.version)))


@functools.cache
def shipped_cards() -> tuple[Card, ...]:
    """Raises `UsageError` when a card of the package is damaged."""
    return tuple(
        read_card(path.read_text(encoding="utf-8"), path.name) for path in sorted(CARDS.glob("*.yaml"))
    )


def read_card(text: str, path: str) -> Card:
    """Raises `UsageError`; `details` is a list of `{line, field, message}`, one per mistake."""
    document = read(text, "a card")
    if document.mistakes and not document.values:
        refuse(UsageError, path, document.mistakes)
    try:
        card = Card.model_validate(document.values)
    except ValidationError as error:
        refuse(
            UsageError,
            path,
            document.mistakes + mistakes_of(error, document, _unknown_key(document), _SOURCES),
        )
    mistakes = [*document.mistakes, *_broken_rules(card, document)]
    if mistakes:
        refuse(UsageError, path, mistakes)
    return card


def _broken_rules(card: Card, document: Document) -> Iterator[Mistake]:
    for field, check in (("name", check_name), ("version", check_version)):
        try:
            check(getattr(card, field))
        except InvalidName as error:
            yield Mistake(document.line_of((field,)), field, f"is not allowed: {error}")
    if card.version.lower() == LATEST:
        yield Mistake(
            document.line_of(("version",)), "version", "is 'latest', which stands for the newest one."
        )
    yield from _broken_numbers(card, document)
    yield from _broken_sources(card, document)
    try:
        defaults_of(card)
    except UsageError as error:
        yield Mistake(document.line_of(("defaults",)), "defaults", f"cannot be used. {error.message}")


def _broken_numbers(card: Card, document: Document) -> Iterator[Mistake]:
    numbers: dict[tuple[str, ...], int] = {
        ("parameters",): card.parameters,
        ("context_length",): card.context_length,
        ("download_bytes",): card.expected_download_bytes,
    }
    for field in Architecture.model_fields:
        value = getattr(card.architecture, field)
        if isinstance(value, int) and not isinstance(value, bool):
            numbers[("architecture", field)] = value
    for place, value in numbers.items():
        if value < 1:
            yield Mistake(document.line_of(place), ".".join(place), f"is {value}, must be 1 or more.")


def _broken_sources(card: Card, document: Document) -> Iterator[Mistake]:
    if not card.sources:
        yield Mistake(document.line_of(("sources",)), "sources", "is empty: the weights must lie somewhere.")
    for number, source in enumerate(card.sources):
        line = document.line_of(("sources", number))
        if isinstance(source, HubSource):
            yield from _broken_hub_source(card, source, f"sources[{number}]", line)
        if isinstance(source, PackageSource) and not _SHA256.fullmatch(source.sha256):
            yield Mistake(line, f"sources[{number}].sha256", "is not a SHA-256: 64 digits of 0-9 and a-f.")
        if isinstance(source, FolderSource) and not Path(source.path).is_absolute():
            message = f"is {source.path!r}, must be absolute. Or: tuneloop catalog use NAME --source FOLDER"
            yield Mistake(line, f"sources[{number}].path", message)


def _broken_hub_source(card: Card, source: HubSource, field: str, line: int | None) -> Iterator[Mistake]:
    if not _REPOSITORY.fullmatch(source.repository):
        yield Mistake(
            line, f"{field}.repository", f"is {source.repository!r}, must be owner/name as on the hub."
        )
    if not _REVISION.fullmatch(source.revision):
        yield Mistake(
            line, f"{field}.revision", f"is {source.revision!r}, must be a commit, a tag or a branch."
        )
    elif card.remote_code and not source.is_pinned:
        message = (
            f"is {source.revision!r}: a model that runs code of its own has to name a commit (40 digits of "
            "0-9 and a-f), or somebody could put other code there."
        )
        yield Mistake(line, f"{field}.revision", message)


def _unknown_key(document: Document) -> Callable[[Place], str]:
    def explain(place: Place) -> str:
        fields = _fields_at(place[:-1], document)
        hint = did_you_mean(str(place[-1]), fields)
        return f"is not a key of a card. {hint or ''}".rstrip()

    return explain


def _fields_at(place: Place, document: Document) -> builtins.list[str]:
    if place == ("architecture",):
        return [*Architecture.model_fields]
    if len(place) == 2 and place[0] == "sources":
        written = document.values["sources"][place[1]]
        return [*_SOURCES[written["type"]].model_fields]
    return [*Card.model_fields]


def _model_folder(folder: Path) -> Path:
    if not folder.is_absolute():
        raise UsageError(f"The folder {folder} is not absolute.", next_move="Give its full path.")
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} holds no config.json.",
            next_move="Give a folder in Hugging Face layout: config.json, *.safetensors, tokenizer.json.",
        )
    return folder


def _repositories(card: Card) -> set[str]:
    return {source.repository.lower() for source in card.sources if isinstance(source, HubSource)}


def _split(name: str) -> tuple[str, str]:
    """Name and version; the version may be `latest`."""
    asset = _ASSET.fullmatch(name)
    if asset:
        return asset["name"], asset["version"]
    wanted, _, version = name.partition(":")
    return wanted, version or LATEST


def _choose(versions: builtins.list[Card], version: str) -> Card | None:
    if version.lower() == LATEST:
        return versions[-1] if versions else None
    return next((card for card in versions if card.version == version), None)


def _key(card: Card) -> str:
    return f"{card.name.lower()}:{card.version}"


def _age(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `9` before `10` and `1.2` before `1.10`."""
    return tuple(
        (1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.findall(r"\d+|\D+", version)
    )
