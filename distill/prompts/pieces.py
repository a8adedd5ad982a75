"""Encoding of a prompt in pieces, such that the decoded pieces together are its text.

Many tokenizers put a space before each text that they encode (SentencePiece's dummy prefix, `add_prefix_space`). With
them, a piece inside a prompt is encoded after another text, whose tokens are then removed. What a tokenizer does not
keep at all, such as upper case or line breaks, is found by a comparison when it is opened.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import final

from transformers import PreTrainedTokenizerBase

from distill.errors import ConfigError

Ids = tuple[int, ...]
CONTEXTS = ("\n", ".", "a", "0", "é")  # texts before a piece; one whose last token does not merge with it is taken
_NUM_CACHED_TEXTS = 512  # cues and choices recur in every example, and the texts of an example in its sequences
# Changed by tokenizers that fold case, spaces, compatibility characters or accents, or delete characters.
_NORMAL = ("A b  C ² é", "a\tb", string.digits, string.punctuation)


@final
class Pieces:
    """Encodes the pieces of prompts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, samples: Sequence[str], marks: Sequence[str] = ()) -> None:
        """Raise ConfigError if the tokenizer loses parts of a text; `samples` are pieces of one, in order.

        Tokens of `marks` are as little part of a text as special tokens are.
        """
        self._tokenizer = tokenizer
        self._inside = functools.lru_cache(_NUM_CACHED_TEXTS)(self._encode_inside)
        self._name = tokenizer.name_or_path or type(tokenizer).__name__
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        special |= {index: name for name, index in tokenizer.get_added_vocab().items() if name in marks}
        special.pop(tokenizer.unk_token_id, None)  # unknown text is a part of a text
        self._special_ids = special.keys()
        self._inside_special = _inside(special.values())
        self._check_normalizer()
        self._before: tuple[tuple[str, Ids], ...] = ()  # none: pieces are encoded as texts
        self.first: Callable[[str], Ids] = self._as_text  # encodes the text with which a prompt begins
        text, decoded = "".join(samples), self._joined(samples)
        if not same_text(decoded, text):
            self._before = tuple((before, self._as_text(before)) for before in CONTEXTS)
            if self._joined(samples) == f" {text}":  # decoding keeps the space that encoding added
                self.first = self
            if not same_text(self._joined(samples), text):
                raise self._lossy(text, decoded)
        self.start = self._start(text)

    def __call__(self, text: str) -> Ids:
        """Token ids of a piece that follows other text; a special token is never among them."""
        return self._inside(text)

    def template(self, text: str, *, is_first: bool) -> Ids:
        """Token ids of a part of a chat template, with the special tokens that it names."""
        return self._as_text(text, special=True) if is_first else self._inside(text, special=True)

    def _encode_inside(self, text: str, *, special: bool = False) -> Ids:
        if not self._before:
            return self._as_text(text, special=special)
        for before, before_ids in self._before:
            ids = self._as_text(before + text, special=special)
            if ids[: len(before_ids)] == before_ids:
                return ids[len(before_ids) :]
        raise ConfigError(
            f"the tokenizer of {self._name} has no tokens for {text[:60]!r} apart from the text before it"
        )

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids, as it was encoded."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        )

    def _as_text(self, text: str, *, special: bool = False) -> Ids:
        """Token ids of a text on its own, without special tokens, or with those that it names."""
        if not text:
            return ()
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))
        # Where the name of a special token is also an entry of the vocabulary, as in Unigram, it is encoded in parts.
        return ids if special or self._special_ids.isdisjoint(ids) else self._in_parts(text)

    def _in_parts(self, text: str) -> Ids:
        first, *others = self._inside_special.split(text)
        if not others:
            raise ConfigError(
                f"the tokenizer of {self._name} has a special token that is ordinary text, in {text[:60]!r}; choose "
                "another end token (eos_token), which texts do not contain"
            )
        return sum((self._encode_inside(part) for part in others), self._as_text(first))

    def _joined(self, pieces: Sequence[str]) -> str:
        """The text of pieces that were encoded one by one."""
        first, *others = pieces
        return self.decode(sum((self._encode_inside(piece) for piece in others), self.first(first)))

    def _start(self, text: str) -> Ids:
        """The special tokens that stand before a text."""
        whole, ids = tuple(self._tokenizer(text).input_ids), self._as_text(text)
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(ids)] == ids), ())

    def _check_normalizer(self) -> None:
        """Compare without the vocabulary, which may lack these characters; NFC keeps a text what it is."""
        normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normalizer is None:
            return
        for text in _NORMAL:
            changed = str(normalizer.normalize_str(text)).replace("▁", " ").removeprefix(" ")
            if not same_text(changed, text):
                raise self._lossy(text, changed)

    def _lossy(self, text: str, decoded: str) -> ConfigError:
        return ConfigError(
            f"the tokenizer of {self._name} does not keep texts as they are: {text!r} is read back as {decoded!r}; "
            "choose a model whose tokenizer keeps upper case, spaces, line breaks, digits and punctuation"
        )


def _inside(names: Iterable[str]) -> re.Pattern[str]:
    """Match between the first and the second character of each of these names."""
    cuts = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1]
    return re.compile("|".join(cuts) or r"\Z\A.")


def same_text(left: str, right: str) -> bool:
    """Whether two texts are equal, composed and decomposed letters being the same."""
    return unicodedata.normalize("NFC", left) == unicodedata.normalize("NFC", right)
