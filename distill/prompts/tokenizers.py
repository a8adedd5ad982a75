"""Tokenizers: loading without remote code, fingerprints, comparison of vocabularies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import ConfigError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, without running code from the folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{folder} has no tokenizer that loads without custom code: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {folder} has no end-of-sequence token; set eos_token in it")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that turns a text into ids, or of the vocabulary if the tokenizer cannot be serialized.

    Truncation and padding are not part of it: they are the state of the last call, and no prompt uses them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    relevant = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The vocabulary, and the ids of the tokens that begin, end and pad a sequence."""
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocabulary": vocabulary_fingerprint(tokenizer), **special}


def check_shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError unless both tokenizers have the same tokens with the same ids and the same end token."""
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    differing = [token for token, index in teacher_ids.items() if student_ids.get(token) != index]
    extra = set(student_ids) - set(teacher_ids)
    if differing or extra:
        token = differing[0] if differing else next(iter(extra))
        raise ConfigError(
            f"teacher and student cannot share soft targets: {len(differing)} of {len(teacher_ids)} tokens of the "
            f"teacher have a different id or no id in the student, and {len(extra)} tokens exist only in the student; "
            f"for example {token!r} has id {teacher_ids.get(token)} in the teacher and {student_ids.get(token)} in the "
            "student. Use models of one family, or train without the losses that need soft targets: "
            "loss=[answer,rationale]"
        )
    if teacher.eos_token_id != student.eos_token_id:
        raise ConfigError(
            f"teacher and student cannot share soft targets: the teacher ends a sequence with id "
            f"{teacher.eos_token_id}, the student with {student.eos_token_id}. Use the same end token in both, or "
            "train without the losses that need soft targets: loss=[answer,rationale]"
        )
