"""Baselines: whole prompts in dataset order, nested lists in Arrow; each implemented as well as it allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.records import SoftTargets

_TOP = 32
_ROWS = 1000  # records per batch, as `datasets` writes them


@torch.inference_mode()
def bare_forward(model: Any, texts: Sequence[Sequence[int]], batch_size: int) -> None:
    """Compute the logits of every position of every text, and discard them."""
    for start in range(0, len(texts), batch_size):
        model(*_padded(texts[start : start + batch_size]), use_cache=False)


@torch.inference_mode()
def naive_capture(model: Any, texts: Sequence[tuple[Sequence[int], int]], batch_size: int, path: Path) -> None:
    """Softmax over every position; write the top 32 of each target as Python lists, batch by batch."""
    row = pa.list_(pa.list_(pa.int32())), pa.list_(pa.list_(pa.float32()))
    schema = pa.schema([("ids", row[0]), ("logprobs", row[1])])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            logits_BTV = model(*_padded([ids for ids, _ in batch]), use_cache=False).logits
            logprobs_BTV = logits_BTV.float().log_softmax(-1)
            tops = [logprobs_BTV[i, first - 1 : len(ids) - 1].topk(_TOP) for i, (ids, first) in enumerate(batch)]
            columns = {"ids": [top.indices.tolist() for top in tops], "logprobs": [top.values.tolist() for top in tops]}
            writer.write_table(pa.table(columns, schema=schema))


def _padded(texts: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    longest = max(map(len, texts))
    ids_BT, mask_BT = torch.zeros(2, len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(len(text))
        ids_BT[row, place], mask_BT[row, place] = torch.tensor(text), 1
    return ids_BT, mask_BT


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], batch_size: int, *, max_new_tokens: int, stop: int
) -> list[list[int]]:
    """Greedy text after each prompt by `transformers`, up to and including `stop` or up to the limit."""
    texts = []
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": stop, "pad_token_id": stop}
    for start in range(0, len(prompts), batch_size):
        ids_BT, mask_BT = _padded(prompts[start : start + batch_size], left=True)
        rows = model.generate(ids_BT, attention_mask=mask_BT, **settings)[:, ids_BT.shape[1] :].tolist()
        texts += [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    return texts


@torch.inference_mode()
def gap(model: Any, prompt: Sequence[int], left: Sequence[int], right: Sequence[int]) -> float:
    """Difference in log-probability, in nats, of the first tokens in which two continuations differ."""
    pairs = list(zip(left, right, strict=False))
    index = next(i for i, (mine, theirs) in enumerate(pairs) if mine != theirs)
    logprobs_V = model(torch.tensor([[*prompt, *left[:index]]])).logits[0, -1].float().log_softmax(-1)
    return abs(float(logprobs_V[left[index]] - logprobs_V[right[index]]))


Tensors = tuple[Int[Tensor, "E"], Int[Tensor, "E"], Float[Tensor, "E"]]  # positions, ids, log-probabilities
Read = Callable[[Sequence[int]], Tensors]


def nested_lists(path: Path, records: Sequence[SoftTargets]) -> dict[str, Read]:
    """Write nested lists to a memory-mapped Arrow file; return the ways in which `datasets` reads records by index."""
    import datasets

    datasets.disable_progress_bars()
    with pa.OSFile(str(path), "wb") as file:
        tables = [_table(records[start : start + _ROWS]) for start in range(0, len(records), _ROWS)]
        with pa.ipc.new_stream(file, tables[0].schema) as stream:
            for table in tables:
                stream.write_table(table)
    plain = datasets.Dataset.from_file(str(path))
    formatted = plain.with_format("torch")

    def lists(indices: Sequence[int]) -> Tensors:
        columns = plain[list(indices)]
        rows = [row for record in columns["ids"] for row in record]
        return (
            _positions(rows),
            torch.tensor([token for row in rows for token in row], dtype=torch.int32),
            torch.tensor([value for record in columns["logprobs"] for row in record for value in row]),
        )

    def tensors(indices: Sequence[int]) -> Tensors:
        columns = formatted[list(indices)]
        rows = [row for record in columns["ids"] for row in record]
        return (
            _positions(rows),
            torch.cat(rows).int(),
            torch.cat([row for record in columns["logprobs"] for row in record]),
        )

    return {"lists": lists, "tensors": tensors}


def _positions(rows: Sequence[Sized]) -> Int[Tensor, "E"]:
    lengths = torch.tensor(list(map(len, rows)))
    return torch.arange(len(rows), dtype=torch.int32).repeat_interleave(lengths)


def _table(records: Sequence[SoftTargets]) -> pa.Table:
    offsets = pa.array(np.cumsum([0, *map(len, records)]), pa.int32())
    ends = pa.array(np.cumsum(np.concatenate([[0], *(record.num_N for record in records)])), pa.int32())
    columns = {}
    for name in ("ids_E", "logprobs_E"):
        rows = pa.ListArray.from_arrays(ends, pa.array(np.concatenate([getattr(r, name) for r in records])))
        columns[name.removesuffix("_E")] = pa.ListArray.from_arrays(offsets, rows)
    return pa.table(columns)
