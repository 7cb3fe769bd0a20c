"""What is changed, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass

TRUTH = "truth"
GOLDEN = "golden/test_golden.py"
RANDOM, EVERY_LOADER = "core/test_random.py", "data/test_every_loader.py"
STEPS = (
    "train/test_accumulation.py",
    GOLDEN,
    TRUTH,
    "train/schedule/test_schedules.py",
    "train/schedule/test_graphs.py",
)
METHODS = ("train/supervision", "train/schedule/test_padding.py", GOLDEN, TRUTH)


@dataclass(frozen=True)
class File:
    """A file of the core."""

    path: str
    tests: tuple[str, ...]
    """Files and folders below tests/; of these the tests that run a changed line."""
    names: tuple[str, ...] = ()
    """The functions and classes that are changed; none: all."""


FILES = (
    File("st_fast/model/flow.py", ("model/test_flow.py", TRUTH)),
    File(
        "st_fast/model/layers.py", ("model/test_sit.py", "model/test_shapes.py", "model/test_bias_gradients.py", TRUTH)
    ),
    File("st_fast/model/transformer.py", ("model/test_sit.py", "model/test_shapes.py", "model/test_mmdit.py", TRUTH)),
    File("st_fast/model/sit.py", ("model/test_sit.py", "model/test_bias_gradients.py", TRUTH)),
    File("st_fast/model/mmdit.py", ("model/test_mmdit.py",)),
    File("kernels/noise/definition.py", (RANDOM, "kernels/test_noise.py", "model/test_flow.py")),
    File("kernels/optimiser/definition.py", ("kernels/test_reference.py", TRUTH)),
    File("st_fast/core/random.py", (RANDOM, EVERY_LOADER, "model/test_flow.py", TRUTH)),
    File("st_fast/train/step.py", STEPS),
    File(
        "st_fast/train/batches.py",
        (*STEPS, EVERY_LOADER, "train/schedule/test_batches.py", *METHODS),
        ("Lookahead", "BatchIterator"),
    ),
    File("st_fast/train/conditions.py", ("train/test_text.py", GOLDEN)),
    File("st_fast/train/optim.py", ("train/test_adamw.py", "train/supervision/test_self_methods.py", GOLDEN, TRUTH)),
    File("st_fast/train/adamw.py", ("train/test_adamw.py", TRUTH)),
    File("st_fast/train/supervision/__init__.py", METHODS),
    File("st_fast/train/supervision/layer_sync.py", METHODS),
    File("st_fast/train/supervision/repa.py", METHODS),
    File("st_fast/train/supervision/self_transcendence.py", METHODS),
    File("st_fast/train/supervision/sra.py", METHODS),
    File("st_fast/train/supervision/velocity_head.py", METHODS),
    File("st_fast/train/supervision/capacity.py", ("train/schedule/test_padding.py",)),
    File("st_fast/sample/guided.py", ("sample",)),
    File(
        "st_fast/sample/source.py",
        ("sample/test_published.py", "evaluate/test_evaluate_command.py", "evaluate/probe/test_probe.py"),
    ),
    File("st_fast/sample/draw.py", ("sample",)),
    File("st_fast/sample/prompts.py", ("sample/test_prompts.py",)),
    File(
        "st_fast/evaluate/attributes.py",
        ("evaluate/test_attributes.py",),
        ("Pictures", "nearest", "prompt_scores", "metrics"),
    ),
    File("st_fast/evaluate/metrics.py", ("evaluate/test_metrics.py",)),
    File("st_fast/data/buckets.py", ("data/test_buckets.py",), ("BucketOrder", "BucketSet", "check_batch")),
    File("st_fast/data/loader.py", ("data/test_loaders.py", EVERY_LOADER), ("ResidentLoader",)),
    File("st_fast/data/ahead.py", ("data/test_loaders.py", EVERY_LOADER)),
    File("st_fast/data/source.py", ("data/test_sources.py",), ("digest",)),
    File("st_fast/data/sources.py", ("data/test_sources.py",), ("_source",)),
    File("st_fast/data/labels.py", ("data/test_sources.py", "data/test_labels.py"), ("top_folder", "counts_line")),
    File("st_fast/data/folders.py", ("data/test_labels.py",), ("check_splits", "_shard_folders")),
    File("st_fast/data/tables.py", ("data/test_tables.py", "data/test_hub.py", "data/test_captions.py")),
    File("st_fast/data/parquet.py", ("data/test_tables.py",), ("split_of", "files_of")),
    File(
        "st_fast/train/log.py",
        ("faults/test_numbers.py",),
        ("Readings", "Meter", "Skips", "SpikeDetector"),
    ),
)
