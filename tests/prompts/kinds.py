"""Small tokenizers of the kinds that models have, trained on a few prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "Question: Is it 3 or 10?\nReason: It is 3, so no.\nAnswer: yes",
    "Question: Was the film good but slow?\nReason: Both.\nAnswer: no, thanks\n\nQ:",
]
ALPHABET = sorted({character for text in TEXTS for character in text} | {"▁"})
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def finished(tokenizer: Tokenizer, start: str | None = "<s>", end: str = "</s>", **settings: Any) -> Any:
    if start:
        ids = [(start, tokenizer.token_to_id(start))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=ids)
    settings = {"unk_token": "<unk>", "bos_token": start, "eos_token": end, **settings}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def trained(tokenizer: Tokenizer, kind: type = trainers.BpeTrainer, **settings: Any) -> Tokenizer:
    settings = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False, **settings}
    tokenizer.train_from_iterator(TEXTS * 3, kind(**settings))
    return tokenizer


def byte_level(**settings: Any) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | settings)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=340))


def composing() -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def split_digits() -> Any:
    tokenizer = byte_level()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def with_byte_tokens(*, prepends: bool, metaspace: bool = False) -> Any:
    """SentencePiece's BPE with byte tokens, as Llama 2 (with a space before a text) and Gemma (without)."""
    words = [f"▁{word}" for word in ("yes", "no", "Is", "it", "Question", "Answer")] + ["Question", "Answer"]
    pieces = [*SPECIAL, *BYTES, *(c for c in ALPHABET if c != "\n")]
    merges: list[tuple[str, str]] = []
    for word in words:
        for length in range(2, len(word) + 1):
            if word[:length] not in pieces:
                pieces.append(word[:length])
                merges.append((word[: length - 1], word[length - 1]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepends else replace
    strip = [decoders.Strip(" ", 1, 0)] if prepends else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return finished(tokenizer)


def metaspace(scheme: str) -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return finished(trained(tokenizer, vocab_size=150))


def prepended() -> Any:
    """A normalizer that prepends, and words that a merge of the whole text joins with their neighbours."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return finished(trained(tokenizer, vocab_size=90))


def unigram(scheme: str = "always", *steps: Any) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    if steps:
        tokenizer.normalizer = normalizers.Sequence(list(steps))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return finished(
        trained(tokenizer, trainers.UnigramTrainer, vocab_size=90, unk_token="<unk>", initial_alphabet=ALPHABET)
    )


def word_piece(*, lowercase: bool) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return finished(trained(tokenizer, trainers.WordPieceTrainer))


def normalizing(step: Any) -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = step
    return tokenizer


KEPT: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level, a space before each text": lambda: byte_level(add_prefix_space=True),
    "byte-level, composing letters": composing,
    "byte-level, digits apart": split_digits,
    "byte tokens, prepending": lambda: with_byte_tokens(prepends=True),
    "byte tokens": lambda: with_byte_tokens(prepends=False),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "byte tokens, metaspace not split": lambda: with_byte_tokens(prepends=True, metaspace=True),
    "prepending": prepended,
    "unigram": unigram,
    "unigram, first": lambda: unigram("first"),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "WordPiece": lambda: word_piece(lowercase=False),
    "WordPiece, lower case": lambda: word_piece(lowercase=True),
    "lower case": lambda: normalizing(normalizers.Lowercase()),
    "compatibility characters": lambda: normalizing(normalizers.NFKC()),
    "accents": lambda: normalizing(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "T5": lambda: unigram("always", normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")),
    "spaces": lambda: normalizing(normalizers.Replace(Regex(" {2,}"), " ")),
    "tabs": lambda: normalizing(normalizers.Replace("\t", " ")),
    "digits": lambda: normalizing(normalizers.Replace(Regex("[0-9]"), "")),
    "punctuation": lambda: normalizing(normalizers.Replace("?", "")),
}


def with_template(single: str, *special: str, end: str = "</s>", start: str | None = None) -> Any:
    """A byte-level tokenizer that puts special tokens around a text."""
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    ids: Sequence[tuple[str, int]] = [(name, backend.token_to_id(name)) for name in special]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end)
