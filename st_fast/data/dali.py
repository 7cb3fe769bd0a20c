"""The DALI loader: shards → DALI's pipeline → batches on the device, copied there while the step before is computed.

DALI's own readers know one sample a file or shuffle within a window only, so which records make a batch comes in from
outside (`external_source`), each batch as one DALI sample: no cost per record, and any batch size.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from st_fast.core.errors import RunFailed, UserError
from st_fast.data.ahead import Answer, Patience, ReadAhead
from st_fast.data.shards import RecordSet

PREFETCH = 2
"""Batches that DALI's pipeline holds beside the ones read ahead."""


def dali_missing() -> str:
    """Why DALI can't be used here, or ""."""
    try:
        importlib.import_module("nvidia.dali.plugin.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


class DaliLoader:
    """Batches through an NVIDIA DALI pipeline, on the GPU or (device_id = None) on the host."""

    def __init__(
        self, records: RecordSet, device: torch.device, workers: int = 2, patience: Patience | None = None
    ) -> None:
        missing = dali_missing()
        if missing:
            raise UserError(f'data.loader = "dali": DALI can\'t be imported ({missing}): pip install st_fast[data]')
        self._records, self._device = records, device
        self._ahead = ReadAhead(records, workers, patience=patience or Patience())

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Answer]:
        """One answer for each request, on the loader's device."""
        batches = self._ahead.stream(requests)
        pipeline = self._pipeline(batches)
        try:
            while (answer := self._next(pipeline)) is not None:
                yield answer
        finally:
            batches.close()

    def close(self) -> None:
        """Lets the threads end."""
        self._ahead.close()

    def _pipeline(self, batches: Iterator[Answer]) -> Any:
        from nvidia.dali import Pipeline, fn, types

        cuda = self._device.type == "cuda"
        device_id = (self._device.index or 0) if cuda else None
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=PREFETCH)
        moments_type = {"float16": types.FLOAT16, "float32": types.FLOAT}[self._records.manifest.dtype]
        with pipeline:
            source = ([[part.numpy()] for part in batch] for batch in batches)
            outputs = fn.external_source(source, num_outputs=2, dtype=[moments_type, types.INT64], ndim=[4, 1])
            pipeline.set_outputs(*(output.gpu() if cuda else output for output in outputs))
        pipeline.build()
        return pipeline

    def _next(self, pipeline: Any) -> Answer | None:
        """The next outputs, copied into tensors of our own so that DALI may use its memory again; None at the end."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = pipeline.run(stream)
        except StopIteration:
            return None
        except (RuntimeError, IndexError) as error:
            raise RunFailed(f"data: DALI's pipeline failed ({str(error).strip().splitlines()[0]})") from error
        dtypes = (getattr(torch, self._records.manifest.dtype), torch.int64)
        moments, labels = (
            feed_ndarray(output[0], torch.empty(output[0].shape(), dtype=dtype, device=self._device), stream)
            for output, dtype in zip(outputs, dtypes, strict=True)
        )
        return moments, labels
