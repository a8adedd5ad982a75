"""Tokenizers: opened without running code, identified, compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import ConfigError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model folder; no code from the folder is run."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{folder} holds no tokenizer that opens without code of its own: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {folder} has no end-of-sequence token; set eos_token in it")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of how text becomes ids: the whole tokenizer where it can be written out, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def check_shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError unless each id of the teacher's vocabulary is the same string for the student."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    differing = [token for token, index in theirs.items() if mine.get(token) != index]
    extra = len(set(mine) - set(theirs))
    if differing or extra:
        example = differing[0] if differing else next(iter(set(mine) - set(theirs)))
        raise ConfigError(
            f"teacher and student cannot share soft targets: {len(differing)} of {len(theirs)} tokens of the "
            f"teacher have another id or none in the student ({extra} tokens are the student's alone), for "
            f"example {example!r}: {theirs.get(example)} there, {mine.get(example)} here. Take models of one "
            "family, or train without the losses that need soft targets: loss=[answer,rationale]"
        )
    if teacher.eos_token_id != student.eos_token_id:
        raise ConfigError(
            f"teacher and student cannot share soft targets: the teacher ends a sequence with id "
            f"{teacher.eos_token_id}, the student with {student.eos_token_id}. Give both the same end token, or "
            "train without the losses that need soft targets: loss=[answer,rationale]"
        )
