"""Tokenizers: loading without remote code, and fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import ConfigError, in_one_line

# What transformers raises for a damaged or unknown file of a tokenizer or for the model's configuration beside it.
_TOKENIZER_ERRORS = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def load_tokenizer(folder: Path, *, has_end: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, without running code from it; ConfigError if it must have an end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.encode("a")  # which reads settings that loading does not
    except Exception as error:
        # The Rust library behind it raises plain `Exception` for a file that it cannot read.
        if not isinstance(error, _TOKENIZER_ERRORS) and type(error) is not Exception:
            raise
        raise ConfigError(f"{folder} has no tokenizer that loads without custom code: {in_one_line(error)}") from None
    if has_end and tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {folder} has no end-of-sequence token; set eos_token in it")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()  # as saved, it may cut and pad until its first use
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # with it, equal texts get different tokens
    return tokenizer


def listed_ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens at which a model folder ends a generated text; ordinary tokens are never among them."""
    try:
        listed = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ()  # there is none, or it is damaged; generation ends as the prompt says
    ids = listed if isinstance(listed, list) else [listed]
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return tuple(token_id for token_id in ids if isinstance(token_id, int) and token_id in known)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides token ids: the tokenizer, or its vocabulary, and the ids of its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    ignored = {"truncation": None, "padding": None}  # set for a batch, and by its use
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([state | ignored, ends], sort_keys=True).encode()).hexdigest()
