"""Tokenizers: loading without remote code, fingerprints, comparison of vocabularies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # as saved, it may cut and pad until its first use
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides token ids: the tokenizer, or its vocabulary, and the ids of its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    ignored = {"truncation": None, "padding": None}  # set for a batch, and by its use
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([state | ignored, ends], sort_keys=True).encode()).hexdigest()


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
