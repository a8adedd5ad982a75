"""The head's logits exist a chunk of positions at a time, within a number of bytes."""

from __future__ import annotations

import pytest
import torch

from distill.losses import head

V, H = 50, 7


@pytest.mark.parametrize("num_positions", [1, 39, 40, 41, 200, 401])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_are_as_large_as_their_bytes_allow_and_no_larger(
    num_positions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 40
    monkeypatch.setattr(head, "_MIN_ROWS", 1)
    monkeypatch.setattr(head, "_CPU_CHUNK_BYTES", largest * V * dtype.itemsize)
    hidden_NH, weight_VH = torch.randn(num_positions, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    chunks = [(start, logits_CV.clone()) for start, logits_CV in head._chunks(hidden_NH, weight_VH, None)]
    sizes = [len(logits_CV) for _, logits_CV in chunks]
    assert [start for start, _ in chunks] == [sum(sizes[:index]) for index in range(len(sizes))]
    assert max(sizes) <= largest
    assert len(sizes) == -(-num_positions // largest)  # as few as possible
    assert len({*sizes[:-1], max(sizes)}) == 1
    torch.testing.assert_close(torch.cat([logits_CV for _, logits_CV in chunks]), hidden_NH @ weight_VH.T)


def test_a_chunk_has_a_least_number_of_rows_however_large_the_vocabulary_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_MIN_ROWS", 3)
    monkeypatch.setattr(head, "_CPU_CHUNK_BYTES", 1)
    starts = [start for start, _ in head._chunks(torch.randn(7, H), torch.randn(V, H), torch.randn(V))]
    assert starts == [0, 3, 6]


def test_no_position_gives_no_chunk() -> None:
    assert list(head._chunks(torch.zeros(0, H), torch.randn(V, H), None)) == []


@pytest.mark.parametrize(("device", "mebibytes"), [("cpu", 64), ("meta", 512)])
def test_logits_of_a_chunk_take_at_most_64_mebibytes_on_a_cpu_and_512_elsewhere(device: str, mebibytes: int) -> None:
    vocabulary = 4096  # a row of logits takes 16 KiB
    largest = mebibytes * 1024 // 16
    weight_VH = torch.ones(vocabulary, 1, device=device)
    for num_positions, num_chunks in ((largest, 1), (largest + 1, 2)):
        chunks = head._chunks(torch.ones(num_positions, 1, device=device), weight_VH, None)
        assert sum(1 for _ in chunks) == num_chunks


def test_a_chunk_has_at_least_256_rows_however_few_bytes_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CPU_CHUNK_BYTES", 1)
    for num_positions, num_chunks in ((256, 1), (257, 2)):
        assert sum(1 for _ in head._chunks(torch.ones(num_positions, 1), torch.ones(V, 1), None)) == num_chunks
