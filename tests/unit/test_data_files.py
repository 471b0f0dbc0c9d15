"""Which files of a dataset make which split: the README's word first, then names, as `datasets` has it."""

from __future__ import annotations

import pytest

from tuneloop.core.errors import DataError, NotFound, Unsupported
from tuneloop.steps.hub.data_files import Chosen, choose

ULTRACHAT = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path: data/test_sft-*
---
# A dataset
"""

TWO = """---
configs:
- config_name: en
  data_files: en/*.jsonl
- config_name: de
  data_files:
  - split: train
    path: [de/a.jsonl, de/b.jsonl]
  - split: test
    path: "**/held-out.jsonl"
---
"""


def splits(names: list[str], readme: str | None = None, subset: str | None = None) -> dict[str, list[str]]:
    return choose(names, readme, subset, place="maker/talk").splits


def chosen(names: list[str], readme: str | None = None, wanted: list[str] | None = None) -> Chosen:
    return choose(names, readme, None, wanted, place="maker/talk")


# ---------------------------------------------------------------- the README


def test_the_readme_says_which_files_make_a_split() -> None:
    names = [
        "README.md",
        "data/train_sft-00001-of-00002-b.parquet",
        "data/train_sft-00000-of-00002-a.parquet",
        "data/test_sft-00000-of-00001-c.parquet",
        "data/train_gen-00000-of-00001-d.parquet",
    ]
    assert splits(names, ULTRACHAT) == {
        "train_sft": ["data/train_sft-00000-of-00002-a.parquet", "data/train_sft-00001-of-00002-b.parquet"],
        "test_sft": ["data/test_sft-00000-of-00001-c.parquet"],
    }


def test_a_subset_of_the_readme_is_chosen_by_name() -> None:
    names = ["en/x.jsonl", "en/deep/y.jsonl", "de/b.jsonl", "de/a.jsonl", "de/more/held-out.jsonl"]
    assert splits(names, TWO, "en") == {"train": ["en/x.jsonl"]}
    assert splits(names, TWO, "de") == {
        "train": ["de/a.jsonl", "de/b.jsonl"],
        "test": ["de/more/held-out.jsonl"],
    }


def test_without_a_default_subset_one_has_to_be_chosen() -> None:
    with pytest.raises(DataError, match="2 subsets") as refused:
        splits(["en/x.jsonl"], TWO)
    assert "--subset: en, de" in str(refused.value.next_move)
    with pytest.raises(NotFound, match="Did you mean 'en'"):
        splits(["en/x.jsonl"], TWO, "eng")


def test_the_default_subset_is_taken_when_none_is_named() -> None:
    by_mark = TWO.replace("- config_name: de\n", "- config_name: de\n  default: true\n")
    assert list(splits(["de/a.jsonl", "de/b.jsonl", "held-out.jsonl"], by_mark)) == ["train", "test"]
    by_name = TWO.replace("config_name: en", "config_name: default")
    assert splits(["en/x.jsonl"], by_name) == {"train": ["en/x.jsonl"]}


def test_a_folder_of_the_readme_bounds_what_is_looked_at() -> None:
    readme = "---\nconfigs:\n- config_name: default\n  data_dir: v2\n---\n"
    found = splits(["v1/train.jsonl", "v2/train.jsonl", "v2/test.jsonl"], readme)
    assert found == {"train": ["v2/train.jsonl"], "test": ["v2/test.jsonl"]}


def test_files_that_the_readme_names_and_that_are_not_there_are_told() -> None:
    with pytest.raises(DataError, match=r"README.md names data/test_sft-\* for test_sft"):
        splits(["data/train_sft-00000-of-00001.parquet"], ULTRACHAT)


def test_what_the_readme_sets_and_is_not_obeyed_is_said() -> None:
    readme = "---\nconfigs:\n- config_name: default\n  sep: ';'\n  data_files: a.csv\n---\n"
    assert chosen(["a.csv"], readme).remarks == ["README.md also sets sep for reading; these are not obeyed."]


@pytest.mark.parametrize("head", ["", "# no head", "---\ntitle: x\n---\n", "---\nconfigs: yes\n---\n"])
def test_a_readme_without_configs_leaves_it_to_the_names(head: str) -> None:
    assert splits(["test.jsonl", "train.jsonl"], head) == {"train": ["train.jsonl"], "test": ["test.jsonl"]}


def test_a_head_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(DataError, match="no YAML"):
        splits(["train.jsonl"], "---\nconfigs: [\n---\n")


def test_a_split_that_cannot_be_a_file_name_is_refused() -> None:
    readme = "---\nconfigs:\n- config_name: a\n  data_files:\n  - {split: ../x, path: a.jsonl}\n---\n"
    with pytest.raises(DataError, match="cannot be the name of a split"):
        splits(["a.jsonl"], readme)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            [
                "data/train_sft-00000-of-00003-a3ec.parquet",
                "data/test-00000-of-00001.parquet",
                "data/x.parquet",
            ],
            {
                "test": ["data/test-00000-of-00001.parquet"],
                "train_sft": ["data/train_sft-00000-of-00003-a3ec.parquet"],
            },
        ),
        (
            ["train_sft-00000-of-00001-a.parquet", "train_gen-00000-of-00001-b.parquet"],
            {
                "train_gen": ["train_gen-00000-of-00001-b.parquet"],
                "train_sft": ["train_sft-00000-of-00001-a.parquet"],
            },
        ),
        (["part-00000-of-00002.parquet"], {"train": ["part-00000-of-00002.parquet"]}),
        (["valid/part-00000-of-00001.parquet"], {"validation": ["valid/part-00000-of-00001.parquet"]}),
        (["data/more/dev-00000-of-00001.parquet"], {"validation": ["data/more/dev-00000-of-00001.parquet"]}),
        (["train.jsonl", "dev.jsonl"], {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}),
        (["my-train-file.csv", "eval_1.csv"], {"train": ["my-train-file.csv"], "test": ["eval_1.csv"]}),
        (["training/a.json", "valid/b.json"], {"train": ["training/a.json"], "validation": ["valid/b.json"]}),
        (["data/2020/test_a/b.json.gz"], {"test": ["data/2020/test_a/b.json.gz"]}),
        (["a.jsonl", "b.jsonl"], {"train": ["a.jsonl", "b.jsonl"]}),
        (["trainer.jsonl", "contest.jsonl"], {"train": ["contest.jsonl", "trainer.jsonl"]}),
        (["train_sft.jsonl", "train_gen.jsonl"], {"train": ["train_gen.jsonl", "train_sft.jsonl"]}),
        ([".hidden/train.jsonl", "__x/train.jsonl", "train.jsonl"], {"train": ["train.jsonl"]}),
    ],
)
def test_names_say_the_split(names: list[str], expected: dict[str, list[str]]) -> None:
    found = splits(names)
    assert found == expected
    assert list(found) == list(expected)


def test_the_hubs_own_conversions_are_understood() -> None:
    names = ["default/train_sft/0000.parquet", "default/train_sft/0001.parquet", "other/train/0000.parquet"]
    assert splits(names) == {"train_sft": names[:2]}
    assert splits(names, None, "other") == {"train": names[2:]}
    with pytest.raises(DataError, match="2 subsets"):
        splits(["a/train/0000.parquet", "b/train/0000.parquet"])


def test_in_a_folder_of_ones_own_each_name_is_a_split() -> None:
    names = ["train_sft.jsonl", "train_gen.jsonl"]
    found = choose(names, None, None, place="here", each_name_a_split=True).splits
    assert found == {"train_gen": ["train_gen.jsonl"], "train_sft": ["train_sft.jsonl"]}


def test_without_a_readme_a_subset_is_a_folder() -> None:
    names = ["en/train.jsonl", "de/train.jsonl"]
    assert splits(names, None, "de") == {"train": ["de/train.jsonl"]}
    with pytest.raises(NotFound) as refused:
        splits(names, None, "fr")
    assert refused.value.next_move == "Its folders: de, en."


def test_a_name_that_cannot_be_a_split_is_refused_and_not_left_out() -> None:
    with pytest.raises(DataError, match="would make the split 'my-train'"):
        splits(["data/my-train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"])


@pytest.mark.parametrize("written", ["7", "[7]", "[{path: a.jsonl}]"])
def test_what_a_readme_should_not_say_is_refused(written: str) -> None:
    with pytest.raises(DataError, match="neither names nor a list"):
        splits(["a.jsonl"], f"---\nconfigs:\n- config_name: default\n  data_files: {written}\n---\n")


# ---------------------------------------------------------------- what is wanted, what can be read


def test_splits_that_are_not_there_are_named_with_those_that_are() -> None:
    names = ["train.jsonl", "test.jsonl"]
    assert list(chosen(names, wanted=["test"]).splits) == ["test"]
    with pytest.raises(NotFound, match="no split 'dev'") as refused:
        chosen(names, wanted=["dev", "test"])
    assert refused.value.next_move == "Its splits: train, test."


def test_of_the_same_rows_in_two_formats_the_more_frequent_is_taken_and_it_is_said() -> None:
    found = chosen(["train.csv", "train.parquet", "test.parquet"])
    assert found.splits == {"train": ["train.parquet"], "test": ["test.parquet"]}
    assert found.remarks == ["train: train.csv left out; most files of maker/talk are parquet."]


def test_a_split_of_another_format_is_refused_unless_it_is_not_wanted() -> None:
    names = ["train.parquet", "train_2.parquet", "test.csv"]
    with pytest.raises(Unsupported, match=r"test has test.csv, and the other splits are parquet") as refused:
        chosen(names)
    assert refused.value.next_move == "Name the splits that you want: --splits train"
    assert list(chosen(names, wanted=["train"]).splits) == ["train"]


def test_a_dataset_that_is_a_program_is_not_run() -> None:
    with pytest.raises(Unsupported, match=r"made by a program, talk.py") as refused:
        splits(["talk.py", "README.md"])
    assert "--revision refs/convert/parquet" in str(refused.value.next_move)


@pytest.mark.parametrize(
    ("names", "said"), [(["a.arrow", "b.zip"], "There is a.arrow, b.zip"), ([], "is nothing")]
)
def test_files_that_are_not_read_are_named(names: list[str], said: str) -> None:
    with pytest.raises(Unsupported, match=said) as refused:
        splits(names)
    assert ".parquet" in str(refused.value.next_move)
