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
FOREIGN = "data/test_foreign_latents.py"
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
    File("st_fast/model/formats/modern.py", ("model/test_modern_files.py",)),
    File("kernels/adaln/definition.py", ("kernels/test_reference.py", "kernels/test_runs.py", "kernels/test_ops.py")),
    File("kernels/noise/definition.py", (RANDOM, "kernels/test_noise.py", "model/test_flow.py")),
    File("kernels/qknorm/definition.py", ("kernels/test_reference.py", "kernels/test_ops.py")),
    File(
        "kernels/mlp/definition.py",
        ("kernels/test_reference.py", "kernels/test_ops.py"),
        ("swiglu", "swiglu_forward", "swiglu_backward"),
    ),
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
    File("st_fast/train/muon.py", ("train/test_muon.py", "faults/test_sharding.py")),
    File("st_fast/train/early_stop.py", ("train/supervision/test_early_stop.py",)),
    File("st_fast/train/supervision/__init__.py", METHODS),
    File("st_fast/train/supervision/layer_sync.py", METHODS),
    File("st_fast/train/supervision/repa.py", METHODS),
    File("st_fast/train/supervision/self_transcendence.py", METHODS),
    File("st_fast/train/supervision/sra.py", METHODS),
    File("st_fast/train/supervision/sra2.py", METHODS),
    File("st_fast/train/supervision/sra_dual.py", METHODS),
    File("st_fast/train/supervision/self_flow.py", METHODS),
    File("st_fast/train/supervision/dispersive.py", METHODS),
    File("st_fast/train/supervision/internal_guidance.py", METHODS),
    File("st_fast/model/layout.py", ("model/test_layout.py",)),
    File("st_fast/train/layouts.py", ("train/test_layouts.py", "train/supervision/test_dual_times.py")),
    File("st_fast/recipe/tokens.py", ("train/test_layouts.py", "recipe/test_routing.py")),
    File("st_fast/recipe/routing.py", ("recipe/test_routing.py",)),
    File("st_fast/recipe/times.py", ("model/test_flow.py", "train/schedule/test_padding.py", TRUTH)),
    File("st_fast/recipe/token_cost.py", ("recipe/test_routing.py", "train/test_routes.py")),
    File("st_fast/model/fusion.py", ("truth/test_truth.py", "sample/test_path_drop.py")),
    File("st_fast/study/frontier.py", ("study/test_frontier.py",)),
    File("st_fast/study/speedrun/record.py", ("study/speedrun/test_record.py",)),
    File("st_fast/study/speedrun/rules.py", ("study/speedrun/test_rules.py",)),
    File("st_fast/study/speedrun/task.py", ("study/speedrun/test_rules.py", "study/speedrun/test_record.py")),
    File("st_fast/study/speedrun/verify.py", ("study/speedrun/test_record.py",)),
    File("st_fast/study/speedrun/origin.py", ("study/speedrun",)),
    File("st_fast/sample/internal.py", ("sample/test_internal_guidance.py",)),
    File("st_fast/sample/contrast.py", ("sample/test_contrast.py",)),
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
    File("st_fast/core/latents.py", ("core/test_latents.py",)),
    File("st_fast/core/pickled_arrays.py", ("core/test_pickled_arrays.py", FOREIGN)),
    File("st_fast/data/statistics.py", ("data/test_statistics.py", "data/test_buckets.py")),
    File("st_fast/data/layouts/records.py", (FOREIGN, "data/test_coco.py", "data/test_repa.py")),
    File("st_fast/data/layouts/npy.py", (FOREIGN, "data/test_coco.py", "data/test_repa.py")),
    File("st_fast/data/layouts/edm.py", (FOREIGN,)),
    File("st_fast/data/layouts/lightningdit.py", (FOREIGN,)),
    File("st_fast/data/layouts/fast_dit.py", (FOREIGN,)),
    File("st_fast/data/layouts/mar.py", (FOREIGN,)),
    File("st_fast/data/layouts/uvit.py", (FOREIGN,)),
    File("st_fast/data/layouts/webdataset.py", (FOREIGN,)),
    File("st_fast/data/layouts/repa.py", ("data/test_repa.py", FOREIGN)),
    File("st_fast/data/layouts/coco.py", ("data/test_coco.py",)),
    File(
        "st_fast/model/autoencoders.py",
        ("model/test_autoencoders.py", "model/test_vae.py"),
    ),
    File(
        "st_fast/model/vae.py",
        ("model/test_vae.py", "model/test_autoencoders.py"),
        ("to_unit", "encode_moments", "decode", "_shift", "_by_channel", "latent_shape"),
    ),
    File("st_fast/model/ldm_vae.py", ("model/test_ldm_vae.py", "prepare/test_normalising.py")),
    File("st_fast/prepare/normalising.py", ("prepare/test_normalising.py",)),
    File("st_fast/train/shapes.py", ("train/test_shapes.py",)),
    File("st_fast/sample/sizes.py", ("sample/test_sizes.py",)),
    File("st_fast/data/labels.py", ("data/test_sources.py", "data/test_labels.py"), ("top_folder", "counts_line")),
    File("st_fast/data/folders.py", ("data/test_labels.py",), ("check_splits", "_shard_folders")),
    File("st_fast/data/tables.py", ("data/test_tables.py", "data/test_hub.py", "data/test_captions.py")),
    File("st_fast/data/parquet.py", ("data/test_tables.py",), ("split_of", "files_of")),
    File(
        "st_fast/train/log.py",
        ("faults/test_numbers.py",),
        ("Readings", "Meter", "Skips", "SpikeDetector"),
    ),
    File("st_fast/model/own.py", ("train/test_api.py",)),
    File("st_fast/model/own_facts.py", ("train/test_api.py",)),
    File("st_fast/data/given.py", ("train/test_api.py",)),
    File("st_fast/train/callbacks.py", ("train/test_api.py",)),
    File("st_fast/train/api.py", ("train/test_api.py",)),
    File("st_fast/train/supervision/given.py", ("train/test_api.py",)),
    File("st_fast/train/supervision/standalone.py", ("train/supervision/test_standalone.py",)),
    File("st_fast/core/checkpoint/dcp.py", ("core/checkpoint/test_dcp.py",)),
    File("st_fast/train/validation.py", ("train/test_validation.py",)),
    File("st_fast/data/held_out.py", ("train/test_validation.py",)),
)
