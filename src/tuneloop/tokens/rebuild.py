"""`python -m tuneloop.tokens.rebuild FOLDER TARGET [--code]`: what transformers makes of a tokenizer folder.

`AutoTokenizer` may rebuild a tokenizer by the rules of its class in place of reading tokenizer.json as it
stands, and it is what serving loads. So its word counts, and it is asked for in a process of its own where
torch cannot be imported: a second and 100 MB in place of several and 500. With `--code` the folder's own
code is run, which may want torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    folder, target, *options = arguments
    may_run_code = "--code" in options
    if not may_run_code:
        # transformers then takes torch for not installed.
        sys.modules["torch"] = None  # type: ignore[assignment]
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=may_run_code
        )
    except Exception as error:  # whatever transformers or the folder's code raises: the parent says it
        return _answer(target, {"error": f"{type(error).__name__}: {error}"})
    if not getattr(tokenizer, "is_fast", False):
        return _answer(target, {"error": None})
    return _answer(
        target,
        {
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "special_tokens": list(tokenizer.all_special_tokens),
            "model_max_length": int(tokenizer.model_max_length),
        },
    )


def _answer(target: str, said: dict[str, object]) -> int:
    Path(target).write_text(json.dumps(said), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
