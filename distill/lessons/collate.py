"""Lessons -> Batch: sequences padded on the right, soft targets read from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from distill.errors import CacheError
from distill.lessons.join import Lesson, Read, SoftPlace
from distill.records import SPANS, Batch, Entries, SoftTargets, Span


def collate(lessons: Sequence[Lesson], counts: Mapping[tuple[Span, str], int], padding_id: int, read: Read) -> Batch:
    """Pad on the right, list the supervised positions by sequence and position, and read their soft targets."""
    sequences = [sequence for lesson in lessons for sequence in lesson.sequences]
    length_B = np.array([len(sequence.ids) for sequence in sequences])
    mask_BT = np.arange(length_B.max()) < length_B[:, None]
    ids_BT = np.full(mask_BT.shape, padding_id)
    ids_BT[mask_BT] = np.concatenate([sequence.ids for sequence in sequences])
    branch_BT, position_BT = np.zeros_like(ids_BT), np.where(mask_BT, np.arange(mask_BT.shape[1]), 0)
    for row, sequence in enumerate(sequences):
        for branch, start in enumerate(sequence.branches, 1):
            branch_BT[row, start:] = branch
            position_BT[row, start : length_B[row]] = sequence.branches[0] + np.arange(length_B[row] - start)
    placed = [(row, target) for row, sequence in enumerate(sequences) for target in sequence.targets]
    sequence_S, start_S, stop_S = np.array([(row, target.start, target.stop) for row, target in placed]).T
    span_id_S, num_soft_S, is_labelled_S = np.array(
        [(SPANS.index(target.span), _num_leading(target.soft), target.is_labelled) for _, target in placed]
    ).T
    target_N = np.repeat(np.arange(len(placed)), stop_S - start_S)
    first_S = np.cumsum(stop_S - start_S) - (stop_S - start_S)
    offset_N = np.arange(len(target_N)) - first_S[target_N]
    index_N, sequence_N = start_S[target_N] + offset_N, sequence_S[target_N]
    softs = [target.soft for _, target in placed]
    places = [soft.place for soft in softs if soft]
    is_soft_N = offset_N < num_soft_S[target_N]
    for first, soft in zip(first_S, softs, strict=True):
        if soft and soft.chosen is not None:
            is_soft_N[first + np.array(soft.chosen)] = True
    return Batch(
        input_ids_BT=torch.from_numpy(ids_BT),
        mask_BT=torch.from_numpy(mask_BT.astype(np.int64)),
        position_BT=torch.from_numpy(position_BT),
        branch_BT=torch.from_numpy(branch_BT) if branch_BT.any() else None,
        sequence_N=torch.from_numpy(sequence_N),
        before_N=torch.from_numpy(index_N - 1),
        label_N=torch.from_numpy(ids_BT[sequence_N, index_N]),
        is_labelled_N=torch.from_numpy(is_labelled_S[target_N] > 0),
        span_N=torch.from_numpy(span_id_S[target_N]),
        target_N=torch.from_numpy(target_N),
        is_soft_N=torch.from_numpy(is_soft_N),
        soft=entries(is_soft_N, read(places).for_training()) if places else None,
        counts=counts,
        example_ids=tuple(id_ for lesson in lessons for id_ in lesson.example_ids),
    )


def _num_leading(soft: SoftPlace | None) -> int:
    """Number of tokens from the beginning of a span that all have soft targets, where they are not chosen ones."""
    return 0 if soft is None or soft.chosen is not None else soft.num_positions


def entries(is_soft_N: np.ndarray, soft: SoftTargets) -> Entries:
    """Return the soft targets as entries of N positions; `is_soft_N` marks the positions that have them."""
    position_M = np.flatnonzero(is_soft_N)
    if len(position_M) != len(soft):
        raise CacheError(
            f"expected soft targets for {len(position_M)} positions, the cache has them for {len(soft)}: it is damaged"
        )
    num_N, tail_N = np.zeros(len(is_soft_N), np.int64), np.zeros(len(is_soft_N), np.float32)
    num_N[position_M], tail_N[position_M] = soft.num_N, soft.tail_N
    return Entries(
        np.cumsum(num_N),
        torch.from_numpy(np.repeat(position_M.astype(np.int32), soft.num_N)),
        torch.from_numpy(soft.ids_E),
        torch.from_numpy(soft.logprobs_E),
        torch.from_numpy(tail_N) if soft.num_drawn_N is None else None,
    )
