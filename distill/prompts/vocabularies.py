"""Which tokens of a student stand for those of its teacher, so that it can learn the teacher's distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import CacheError, ConfigError
from distill.records import Annotation, SoftTargets, SoftTargetsKey, Target, ragged_indices

_NONE = -1  # the student's id for a token of the teacher that has no counterpart


@dataclass(frozen=True)
class Pairing:
    """The student's id for each id of the teacher, -1 without a counterpart; None: their ids are the same.

    A teacher's probability of a token without a counterpart is never given to other tokens: it belongs to the rest of
    the distribution.
    """

    id_V: np.ndarray | None = None

    @property
    def num_unpaired(self) -> int:
        """Number of the teacher's tokens without a counterpart."""
        return 0 if self.id_V is None else int((self.id_V < 0).sum())

    def ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The student's ids for the teacher's; -1 without a counterpart."""
        return tuple(token_ids) if self.id_V is None else tuple(self.id_V[list(token_ids)].tolist())

    def has(self, student_ids: Sequence[int]) -> bool:
        """Whether the teacher has all these tokens of the student."""
        return self.id_V is None or bool(np.isin(student_ids, self.id_V).all())

    def soft(self, soft: SoftTargets) -> SoftTargets:
        """Soft targets over the student's ids, from those over the teacher's.

        The mass of exact entries without a counterpart goes to the tail. Sampled ones represent a part of the tail
        that the student cannot have; they are left out, and the weights of the others remain.
        """
        if self.id_V is None:
            return soft
        if soft.ids_E.max(initial=-1) >= len(self.id_V):
            raise CacheError(
                f"the cache has soft targets for token id {soft.ids_E.max()}, the teacher has {len(self.id_V)} tokens: "
                "the cache is damaged or of another vocabulary; annotate again"
            )
        ids_E, (row_E, _), is_exact_E = self.id_V[soft.ids_E], ragged_indices(soft.num_N), soft.is_exact_E
        is_kept_E = ids_E >= 0
        lost_exact = ~is_kept_E & is_exact_E
        lost_N = np.bincount(row_E[lost_exact], np.exp(soft.logprobs_E[lost_exact].astype(np.float64)), len(soft))
        drawn_N = soft.num_drawn_N
        return SoftTargets(
            ids_E[is_kept_E],
            soft.logprobs_E[is_kept_E],
            (soft.tail_N + lost_N).astype(soft.tail_N.dtype),
            _count(row_E[is_kept_E & is_exact_E], soft.num_exact_N),
            None if drawn_N is None else _count(row_E[is_kept_E & ~is_exact_E], drawn_N),
        )

    def read(
        self, read: Callable[[Sequence[SoftTargetsKey]], SoftTargets], keys: Sequence[SoftTargetsKey]
    ) -> SoftTargets:
        """Read soft targets, over the student's ids."""
        return self.soft(read(keys))

    def annotation(self, annotation: Annotation) -> Annotation:
        """An annotation with targets over the student's ids, without those whose tokens have no counterpart."""
        if self.id_V is None:
            return annotation
        targets = {
            span: Target(self.ids(target.token_ids), target.soft and self.soft(target.soft), target.chosen)
            for span, target in annotation.targets.items()
        }
        return replace(
            annotation, targets={s: target for s, target in targets.items() if _NONE not in target.token_ids}
        )


def _count(row_E: np.ndarray, like_N: np.ndarray) -> np.ndarray:
    """Number of entries of each row."""
    return np.bincount(row_E, minlength=len(like_N)).astype(like_N.dtype)


def pair_vocabularies(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *, ends: tuple[int, int]
) -> Pairing:
    """Pair the tokens of two tokenizers by their names, and the tokens that end their targets, `ends`, by their role.

    Raises ConfigError unless they have the same tokens with the same ids. Only added tokens, such as those of a chat,
    may differ; those that the other lacks have no counterpart.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    added = {*teacher.get_added_vocab(), *student.get_added_vocab()}
    differing = [t for t, index in teacher_ids.items() if t not in added and student_ids.get(t) != index]
    extra = student_ids.keys() - teacher_ids.keys() - added
    if differing or extra:
        token = differing[0] if differing else min(extra)
        raise ConfigError(
            f"teacher and student cannot share soft targets: {len(differing)} of {len(teacher_ids)} tokens of the "
            f"teacher have a different id or no id in the student, and {len(extra)} tokens exist only in the student; "
            f"for example {token!r} has id {teacher_ids.get(token)} in the teacher and {student_ids.get(token)} in the "
            "student. Use models of one family, or train without the losses that need soft targets: "
            "loss=[answer,rationale]"
        )
    id_V = np.full(max(teacher_ids.values()) + 1, _NONE, np.int32)
    for token, index in teacher_ids.items():
        id_V[index] = student_ids.get(token, _NONE)
    teacher_end, student_end = ends
    id_V[id_V == student_end] = _NONE
    id_V[teacher_end] = student_end
    is_same = len(teacher_ids) == len(student_ids) and np.array_equal(id_V, np.arange(len(id_V)))
    return Pairing(None if is_same else id_V)
