"""Which files of a dataset's repository make which split.

As the `datasets` library decides (5.2: `data_files.py`, `utils/metadata.py`, `load.py`): the `configs:` at
the head of the README, else names. Two names more are understood, on which it would merge splits or fail:
`train_sft-00000-of-00003.parquet` outside of `data/`, and `CONFIG/SPLIT/0000.parquet`, as in the hub's own
conversions (branch `refs/convert/parquet`). Pure: names and text in, names out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml

from tuneloop.core.errors import DataError, NotFound, Unsupported
from tuneloop.core.names import did_you_mean

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Of files that are read, before `.gz`, to their kind; in a draw the first one is preferred."""

README = "README.md"

_IGNORED = {README, "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"
_WORD_IN_FOLDER = "(?:.*/)?(?:[^/]*{sep})?{word}(?:{sep}[^/]*)?/.*"
_WORD_IN_NAME = "(?:.*/)?(?:[^/]*{sep})?{word}{sep}[^/]*"
_ANY_WORD = "|".join(word for words in _KEYWORDS.values() for word in words)
_IN_DATA = re.compile(r"data/(?P<split>[^/]+?)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_AT_ROOT = re.compile(rf"(?P<split>(?:{_ANY_WORD})_[^/-]+)-\d{{5}}-of-\d{{5}}[^/]*\.[^/]*")
_CONVERTED = re.compile(r"(?P<config>[^/]+)/(?P<split>[^/]+)/\d{4}\.parquet")
_IN_SPLIT_FOLDERS = re.compile(r"(?P<split>[^/]+)/\d{4}\.parquet")
_SPLIT = re.compile(r"\w+(\.\w+)*")
_KNOWN_KEYS = {"config_name", "data_files", "data_dir", "default", "drop_labels"}


class Chosen(NamedTuple):
    """Splits in order, each with its files in order; what was left out or not obeyed, for people."""

    splits: dict[str, list[str]]
    remarks: list[str]


def choose(
    names: Iterable[str],
    readme: str | None,
    subset: str | None,
    wanted: Sequence[str] | None = None,
    *,
    place: str,
    each_name_a_split: bool = False,
) -> Chosen:
    """The `wanted` splits (None: all) of a subset (None: the default one) out of all files of a repository.

    `each_name_a_split`: where names alone decide, `train_sft.jsonl` and `train_gen.jsonl` are two splits, and
    not both train. Raises `NotFound`, `DataError` and `Unsupported`, naming the choices.
    """
    files = sorted(name for name in names if _is_visible(name))
    configs = _configs(readme, place)
    remarks: list[str] = []
    if configs:
        config = _pick(configs, subset, place)
        unknown = sorted(set(config) - _KNOWN_KEYS)
        if unknown:
            remarks.append(f"{README} also sets {', '.join(unknown)} for reading; these are not obeyed.")
        splits = _of_config(config, files, place)
    else:
        under = _folder_of(files, subset, place)
        inside = [name.removeprefix(under) for name in files if name.startswith(under)]
        found = _by_names(inside, each_name_a_split, place)
        splits = {split: [under + name for name in names] for split, names in found.items()}
    splits = {split: found for split, found in splits.items() if found}
    return _readable(_wanted(splits, wanted, place), files, remarks, place)


def _wanted(splits: dict[str, list[str]], wanted: Sequence[str] | None, place: str) -> dict[str, list[str]]:
    for split in splits:
        if not _SPLIT.fullmatch(split):
            raise DataError(f"{place}: {split!r} cannot be the name of a split.")
    if wanted is None or not splits:
        return splits
    missing = [split for split in wanted if split not in splits]
    if missing:
        raise NotFound(
            f"{place} has no split {', '.join(map(repr, missing))}.",
            next_move=f"Its splits: {', '.join(splits)}.",
        )
    return {split: splits[split] for split in wanted}


# ---------------------------------------------------------------- the README


def _configs(readme: str | None, place: str) -> list[dict[str, Any]]:
    """`configs:` of the README's head."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme or "", re.DOTALL)
    if not found:
        return []
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise DataError(
            f"{place}: the head of its {README} is no YAML: {str(error).splitlines()[0]}.",
            next_move="Take another revision, or a copy of the repository whose README is mended.",
        ) from None
    configs = head.get("configs") if isinstance(head, dict) else None
    listed = configs if isinstance(configs, list) else []
    return [config for config in listed if isinstance(config, dict) and config.get("config_name")]


def _pick(configs: list[dict[str, Any]], subset: str | None, place: str) -> dict[str, Any]:
    named = {str(config["config_name"]): config for config in configs}
    if subset is not None:
        if subset not in named:
            raise NotFound(
                f"{place} has no subset {subset!r}. {did_you_mean(subset, named) or ''}".strip(),
                next_move=f"Its subsets: {', '.join(named)}.",
            )
        return named[subset]
    by_default = [name for name, config in named.items() if config.get("default") is True]
    if len(named) > 1 and not by_default and "default" not in named:
        raise DataError(
            f"{place} has {len(named)} subsets and none of them is the default.",
            next_move=f"Choose one with --subset: {', '.join(named)}.",
        )
    return named[by_default[0]] if by_default else named.get("default") or configs[0]


def _of_config(config: Mapping[str, Any], files: Sequence[str], place: str) -> dict[str, list[str]]:
    folder = str(config.get("data_dir") or "").strip("/")
    under = f"{folder}/" if folder else ""
    inside = [name.removeprefix(under) for name in files if name.startswith(under)]
    patterns = _patterns(config.get("data_files"), place)
    if patterns is None:
        splits = _by_names(inside, False, place)
    else:
        splits = {split: _matching(inside, each) for split, each in patterns.items()}
        for split, found in splits.items():
            if not found:
                raise DataError(
                    f"{place}: {README} names {', '.join(patterns[split])} for {split}, and there is no such "
                    "file.",
                    next_move="Take another revision with --revision.",
                )
    return {split: [under + name for name in found] for split, found in splits.items()}


def _patterns(written: Any, place: str) -> dict[str, list[str]] | None:
    """Split to patterns. A list of names, or one name, is train."""
    if not written:
        return None
    if isinstance(written, str):
        return {"train": [written]}
    if isinstance(written, Mapping):
        return {str(split): _listed(path) for split, path in written.items()}
    if isinstance(written, list) and all(isinstance(entry, str) for entry in written):
        return {"train": list(written)}
    if isinstance(written, list) and all(
        isinstance(e, dict) and {"split", "path"} <= set(e) for e in written
    ):
        return {str(entry["split"]): _listed(entry["path"]) for entry in written}
    raise DataError(
        f"{place}: 'data_files' in its {README} is neither names nor a list of split and path.",
        next_move="Take another revision with --revision.",
    )


def _listed(path: Any) -> list[str]:
    return [str(each) for each in path] if isinstance(path, list) else [str(path)]


# ---------------------------------------------------------------- names


def _folder_of(files: Sequence[str], subset: str | None, place: str) -> str:
    """Without `configs:` a subset is a folder at the root."""
    converted = {found["config"] for name in files if (found := _CONVERTED.fullmatch(name))}
    if subset is None:
        if len(converted) > 1 and "default" not in converted:
            raise DataError(
                f"{place} has {len(converted)} subsets.",
                next_move=f"Choose one with --subset: {', '.join(sorted(converted))}.",
            )
        return f"{'default' if len(converted) > 1 else min(converted)}/" if converted else ""
    if not any(name.startswith(f"{subset}/") for name in files):
        folders = sorted({name.split("/")[0] for name in files if "/" in name})
        raise NotFound(
            f"{place} has no subset {subset!r}: no 'configs:' in its {README}, and no folder of that name.",
            next_move=f"Its folders: {', '.join(folders)}." if folders else "Leave --subset out.",
        )
    return f"{subset}/"


def _by_names(files: Sequence[str], each_name_a_split: bool, place: str) -> dict[str, list[str]]:
    data = [name for name in files if _suffix(name)]
    for pattern, is_all in ((_IN_DATA, False), (_IN_SPLIT_FOLDERS, True), (_AT_ROOT, True)):
        found = {name: match["split"] for name in data if (match := pattern.fullmatch(name))}
        if found and (len(found) == len(data) or not is_all):
            return _in_usual_order(_grouped(found, place))
    if each_name_a_split and data and not any("/" in name for name in data):
        return _in_usual_order(_grouped({name: name.split(".")[0] for name in data}, place))
    for form in (_WORD_IN_FOLDER, _WORD_IN_NAME):
        splits = {split: _with_words(data, form, words) for split, words in _KEYWORDS.items()}
        if any(splits.values()):
            return {split: names for split, names in splits.items() if names}
    return {"train": data} if data else {}


def _grouped(split_of: Mapping[str, str], place: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, split in split_of.items():
        if not _SPLIT.fullmatch(split):
            raise DataError(
                f"{place}: {name} would make the split {split!r}, which cannot be the name of one.",
                next_move="Take a copy of the folder in which that file has another name.",
            )
        found.setdefault(split, []).append(name)
    return found


def _with_words(files: Sequence[str], pattern: str, words: Iterable[str]) -> list[str]:
    written = [re.compile(pattern.format(sep=_SEPARATOR, word=word)) for word in words]
    return [name for name in files if any(each.fullmatch(name) for each in written)]


def _in_usual_order(splits: Mapping[str, list[str]]) -> dict[str, list[str]]:
    order = [name for name in _KEYWORDS if name in splits] + sorted(set(splits) - set(_KEYWORDS))
    return {name: splits[name] for name in order}


def _is_visible(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts[-1] not in _IGNORED and not any(part.startswith((".", "__")) for part in parts)


def _matching(files: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """In the order of the patterns, each file once."""
    found: dict[str, None] = {}
    for pattern in patterns:
        written = _compiled(pattern.removeprefix("./"))
        found.update(dict.fromkeys(name for name in files if written.fullmatch(name)))
    return list(found)


def _compiled(pattern: str) -> re.Pattern[str]:
    """fsspec's glob: `*` stays within a folder, `**` does not."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    meant = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meant.get(piece) or (_character_class(piece) if number % 2 else re.escape(piece))
            for number, piece in enumerate(pieces)
        )
    )


def _character_class(written: str) -> str:
    inside = written[1:-1].replace("\\", "\\\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"


# ---------------------------------------------------------------- what is read of it


def _suffix(name: str) -> str | None:
    suffixes = PurePosixPath(name.lower().removesuffix(".gz")).suffixes[-1:]
    return suffixes[0] if suffixes and suffixes[0] in SUFFIXES else None


def _readable(
    splits: Mapping[str, list[str]], files: Sequence[str], remarks: list[str], place: str
) -> Chosen:
    """Files of one kind: the most common one, as there may be the same rows in two."""
    kinds = Counter(
        SUFFIXES[suffix] for names in splits.values() for each in names if (suffix := _suffix(each))
    )
    if not kinds:
        raise _nothing(files, place)
    most = max(kinds.values())
    kind = next(each for each in SUFFIXES.values() if kinds[each] == most)
    kept: dict[str, list[str]] = {}
    for split, names in splits.items():
        kept[split] = [name for name in names if SUFFIXES.get(_suffix(name) or "") == kind]
        left_out = [name for name in names if name not in kept[split]]
        if left_out:
            remarks.append(f"{split}: {_few(left_out)} left out; most files of {place} are {kind}.")
        if not kept[split]:
            raise Unsupported(
                f"{place}: {split} has {_few(names)}, and the other splits are {kind}.",
                next_move="Name the splits that you want: --splits "
                + ",".join(each for each in splits if each != split),
            )
    return Chosen(kept, remarks)


def _nothing(files: Sequence[str], place: str) -> Unsupported:
    scripts = [name for name in files if name.endswith(".py")]
    if scripts:
        return Unsupported(
            f"{place} is made by a program, {scripts[0]}, and holds no data files. Tuneloop runs no code of "
            "a dataset.",
            next_move="The hub keeps a converted copy of most such datasets: add --revision "
            "refs/convert/parquet",
        )
    others = _few([name for name in files if name not in _IGNORED]) if files else "nothing"
    return Unsupported(
        f"{place} holds no file that can be read as rows. There is {others}.",
        next_move=f"Read are {', '.join(SUFFIXES)}, the text ones also with .gz.",
    )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
