"""Tokenizers without torch: a model's folder, conversations in, token ids and loss masks out.

    tokenize = Tokenize(folder, max_seq_length=2048)
    for row, found in tokenize(rows): ...

Used by the steps and, for folders and templates, by `lm`. Imports `tokenizers`, which is small; never torch,
and transformers only in a process of its own (`rebuild`). The command line and the server never import it.
"""

from tuneloop.tokens.backend import Backend, load_backend
from tuneloop.tokens.folders import MODEL_NOTE, load_template, may_run_code, read_note, resolve_folders
from tuneloop.tokens.lengths import LongRows, Loss
from tuneloop.tokens.tokenize import Tokenised, Tokenize, Tokens

__all__ = [
    "MODEL_NOTE",
    "Backend",
    "LongRows",
    "Loss",
    "Tokenised",
    "Tokenize",
    "Tokens",
    "load_backend",
    "load_template",
    "may_run_code",
    "read_note",
    "resolve_folders",
]
