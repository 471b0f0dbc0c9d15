"""`tuneloop data`: fetch conversations, bring them into the layout that is learned from, divide them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from tuneloop.cli import data_convert, data_look, data_registered, looks, output, words
from tuneloop.core.data.outputs import outputs

SCRIPT = Path(__file__).parent.parent / "samples" / "scripts" / "download-dataset.py.txt"


@click.group("data")
def data_() -> None:
    """Your data: download, check, look at, convert, split, register.

    Tuneloop learns from conversations: a row a conversation, {"messages": [{"role": ..., "content": ...}]}.

    \b
    Examples:
      tuneloop data download HuggingFaceH4/ultrachat_200k --split-pct 5 --to ultrachat_200k_dataset
      tuneloop data check train.jsonl --model SmolLM2-135M-Instruct
      tuneloop data convert sharegpt.json --to conversations.jsonl
      tuneloop data split conversations.jsonl --to my-data
    """


data_.add_command(data_look.check_)
data_.add_command(data_look.stats_)
data_.add_command(data_look.show_)
data_.add_command(data_convert.convert_)
data_.add_command(data_convert.split_)
data_.add_command(data_registered.list_)
data_.add_command(data_registered.register_)
data_.add_command(data_registered.describe_)


def _names(_ctx: click.Context, _param: click.Parameter, written: str | None) -> list[str] | None:
    if written is None:
        return None
    names = [name.strip() for name in written.split(",") if name.strip()]
    if not names:
        raise click.BadParameter("name at least one split, such as train_sft,test_sft.")
    return list(dict.fromkeys(names))


@data_.command("download")
@click.argument("dataset")
@click.option("--subset", metavar="S", help="Subset (configuration); default: the dataset's own default.")
@click.option(
    "--split-pct",
    type=words.FiniteRange(0, 100, min_open=True),
    metavar="P",
    help="Only the first P per cent of each split; default: all rows.",
)
@click.option("--splits", callback=_names, metavar="A,B", help="Only these splits; default: all.")
@click.option("--revision", default="main", metavar="R", show_default=True, help="Branch, tag or commit.")
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for the files; made where it is missing.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "parquet"]),
    default="jsonl",
    show_default=True,
    help="What to write.",
)
@click.option("--force", is_flag=True, help="Replace files that hold something else.")
@output.json_option
def download_(
    dataset: str,
    subset: str | None,
    split_pct: float | None,
    splits: list[str] | None,
    revision: str,
    to: Path,
    form: str,
    force: bool,
    as_json: bool,
) -> None:
    """Fetch a dataset: of every split the first rows, into DIR/SPLIT.jsonl, with all columns.

    DATASET is a name on the Hugging Face hub, OWNER/NAME, or a folder or file on this machine (written with a
    leading ./ or / where there might be doubt). Nothing is shuffled. Every file of the hub is checked against
    the digest that the hub lists; a download that was stopped goes on where it was when you repeat the
    command. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE count.

    Of a hundred rows 5 per cent are five; halves are rounded to even, as by the library `datasets`. The JSON
    Lines are the same bytes that its to_json writes. Of Parquet only the files that hold those rows are
    fetched.

    \b
    Examples:
      tuneloop data download HuggingFaceH4/ultrachat_200k --split-pct 5 --to ultrachat_200k_dataset
      tuneloop data download HuggingFaceH4/ultrachat_200k --splits train_sft,test_sft --to data
      tuneloop data download ./my-parquet-files --to data
    """
    parameters: dict[str, Any] = {
        "subset": subset,
        "splits": splits,
        "split_pct": split_pct,
        "revision": revision,
        "target": str(to.absolute()),
        "format": form,
        "force": force,
    }
    inputs: dict[str, Path] = {}
    if _is_local(dataset):
        if revision != "main":
            raise click.UsageError(f"--revision is for the hub, and {dataset} is on this machine.")
        inputs["source"] = Path(dataset).expanduser()
    else:
        parameters["dataset"] = dataset
    # Not remembered: whoever asks again wants the files to be there, whatever became of them.
    folder = looks.run(
        "dataset_download", parameters, inputs, {"report": "file"}, label=dataset, cached=False
    )
    for warning in looks.result(folder).warnings:
        output.warn(warning)
    report = looks.output_json(folder, "report")
    if as_json:
        output.print_json(report)
    else:
        _tell(report, to)


def _is_local(written: str) -> bool:
    """A name that could be either is a path where there is one."""
    return written.startswith((".", "/", "~")) or written.count("/") > 1 or Path(written).exists()


def _tell(report: dict[str, Any], to: Path) -> None:
    at = f" at {report['commit'][:12]}" if report["commit"] else ""
    output.say(f"{report['dataset']}{at} is in {to}{os.sep}")
    rows = (
        (
            split["file"],
            f"{split['rows']:,}",
            f"{split['of_rows']:,}",
            output.size(split["size_bytes"]),
            split["state"],
        )
        for split in report["splits"]
    )
    output.table(("FILE", "ROWS", "OF", "SIZE", "STATE"), rows)


@data_.command("download-script")
@click.option(
    "--to",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    default="download-dataset.py",
    show_default=True,
    metavar="FILE",
    help="Where to write it; - for stdout.",
)
@click.option("--force", is_flag=True, help="Replace a file that holds something else.")
@output.json_option
def download_script_(to: Path, force: bool, as_json: bool) -> None:
    """Write download-dataset.py, which fetches a dataset without Tuneloop.

    It needs the Python package datasets (2.9.0 or later) and nothing else, and takes --dataset,
    --dataset_subset, --dataset_split_pc and --download_dir.

    \b
    Example:
      tuneloop data download-script
      python download-dataset.py --dataset HuggingFaceH4/ultrachat_200k \\
          --download_dir ultrachat_200k_dataset --dataset_split_pc 5
    """
    text = SCRIPT.read_text(encoding="utf-8")
    state = "printed"
    if str(to) != "-":
        with outputs(to, force) as made:
            made.begin(to).write_text(text, encoding="utf-8")
            state = made.finish()[to]
    if as_json:
        shown = None if str(to) == "-" else str(to.absolute())
        output.print_json({"path": shown, "state": state, "script": text})
    elif str(to) == "-":
        click.echo(text, nl=False)
    else:
        output.say(f"{to} is {'there already' if state == 'unchanged' else 'written'}. Run it with:")
        output.say(
            f"  python {to} --dataset HuggingFaceH4/ultrachat_200k --download_dir ultrachat_200k_dataset "
            "--dataset_split_pc 5"
        )
