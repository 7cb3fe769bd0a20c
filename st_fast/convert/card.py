"""A model card (README.md), generated from a run's log; it states what is unknown."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from st_fast import __version__
from st_fast.core.errors import UserError
from st_fast.core.files import printable, read_json
from st_fast.data.shards import read_any_manifest
from st_fast.model.load import TextStates
from st_fast.model.stored import ModelSource
from st_fast.recipe import load_run, to_toml
from st_fast.recipe.schema import Recipe
from st_fast.report import words
from st_fast.report.arms import Arm, make_arms
from st_fast.report.collect import read_run
from st_fast.report.metrics import METRICS, apart, metric_of

HEADER = """---
library_name: {library}
pipeline_tag: {task}
tags:
- st_fast
- {network}
- diffusion
---

# {title}

{name}, {parameters:.1f} M parameters, {condition}, latents {shape}. It predicts the
velocity of a flow on the {path} path, where t = 1 is noise and t = 0 is data. Weights: {weights}, step {step:,}.
{remarks}"""
INTERNAL = """
A second final layer on block {block} predicts the velocity, too. Internal Guidance (arXiv 2512.24176) leads away from
it: v = v_i + w (v_f - v_i), by `internal_guidance` w (1: none).
"""
FUSION = """
Blocks {first} to {last} can be skipped, with mask tokens for what they make (SPRINT, arXiv 2510.21986). Path-drop
guidance, `Sample(guidance="path_drop", cfg_scale=w)`, leads away from the network without them and without a condition,
for less than two passes.
"""
CONTRAST = """
It was trained with a contrast (arXiv 2506.05350), whose bias stays in what is drawn: the data's mean latent, by which
drawing from the run takes it out, has no place in this folder.
"""

USE = {
    ("huggingface", "sit"): """## Use

```python
import torch
from st_fast.model import SiT
from st_fast.recipe.schema import Sample
from st_fast.sample.draw import balanced
from st_fast.sample.guided import sample

model = SiT.from_pretrained({name!r})  # a folder or a name on the hub
draw = balanced(seed=0, first=0, count=8, num_classes={classes}, device=torch.device("cpu"))
latents = sample(model, draw, Sample(sampler="heun", steps=50, cfg_scale={cfg:g}), "{path}")
```
""",
    ("huggingface", "mmdit"): """## Use

```python
import torch
from st_fast.model import MMDiT
from st_fast.model.text_encoders import load_text_encoder
from st_fast.recipe.schema import Sample
from st_fast.sample.draw import balanced
from st_fast.sample.guided import sample
from st_fast.sample.prompts import EncodedPrompts

texts, cpu = {texts}, torch.device("cpu")
model = MMDiT.from_pretrained({name!r})  # a folder or a name on the hub
encoder = load_text_encoder({encoder!r}, cpu, torch.float32, length={length}, mask={mask})  # its folder or hub name
draw = balanced(0, first=0, count=8, num_classes=len(texts), device=cpu, prompts=EncodedPrompts(texts, encoder, cpu))
latents = sample(model, draw, Sample(sampler="heun", steps=50, cfg_scale={cfg:g}), "{path}")
```
""",
    ("diffusers", "sit"): """## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name!r}, custom_pipeline={name!r}, trust_remote_code=True)
{call}
```
{without}
`trust_remote_code` is needed because pipeline.py and transformer/{network}_transformer.py are in this folder; read
them first.
""",
}
USE["diffusers", "mmdit"] = USE["diffusers", "sit"]
NAMED = 1_000
"""Classes whose names a card has."""
PROMPTS = ["two dogs on a beach", "a red bus"]


def plain(text: object) -> str:
    """Somebody's text as it is, in Markdown or a table's cell: no markup, HTML, link or new line comes of it."""
    escaped = re.sub(r"([\\`*\[\]<>|&~#$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def code(text: object) -> str:
    """Somebody's text as a code span."""
    shown = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if len(fence) > 1 else f"`{shown}`"


def card(
    origin: ModelSource, weights: str, form: str, name: str, vae: str, text: TextStates,
    decodes: bool = True, scale: float | None = None, reads: bool = True,
) -> str:  # fmt: skip
    """The card of a model in the form "huggingface" or "diffusers", called `name`; `vae` names its VAE, or is empty.

    `text`: whose states it was trained on. `decodes`: whether the diffusers folder gives images, and not latents, which
    are `scale` times the VAE's; `reads`: whether it has the text encoder.
    """
    config, recipe = origin.loaded.config, load_run(origin.run) if origin.run else None
    cfg, shape = recipe.sample.cfg_scale if recipe else 1.0, " × ".join(map(str, config.latent_shape))
    call, without = "images = pipe({asked}, seed=0).images", ""
    if not decodes:
        call = 'latents = pipe({asked}, seed=0, output_type="latent").images  # (B, C, H, W), {scale} times a VAE\'s'
        without = (
            "\nNo VAE is in this folder: `vae=AutoencoderKL.from_pretrained(…)` as one more argument gives images.\n"
        )
    asked: list[Any] = list(range(min(3, config.num_classes)))
    names = class_names(recipe) if recipe and config.network == "sit" else ()
    condition = f"class-conditional over {config.num_classes} classes"
    if config.num_classes == 1:
        condition = f"of the one class {plain(names[0])}" if names else "of one class, so without a condition"
    if config.network == "mmdit":
        asked, condition = PROMPTS, f"conditional on text ({_states(text, config.text_length, config.text_width)})"
        if not reads:
            without += (
                "\nNo text encoder is in this folder: `text_encoder=AutoModel.from_pretrained(…)` (of CLIP "
                "`CLIPTextModel`, of T5 `T5EncoderModel`) and `tokenizer=AutoTokenizer.from_pretrained(…)` as more "
                "arguments read prompts.\n"
            )
    call = call.format(asked=asked, scale="some" if scale is None else f"{scale:g}")
    remarks = [INTERNAL.format(block=config.internal_head)] * (config.internal_head > 0)
    remarks += [FUSION.format(first=config.fusion_first + 1, last=config.fusion_last)] * (config.fusion_last > 0)
    remarks += [CONTRAST] * bool(origin.loaded.mean_latents)
    parts = [
        HEADER.format(
            library="diffusers" if form == "diffusers" else "st_fast", title=plain(name), name=plain(config.name),
            parameters=config.parameters / 1e6, condition=condition, network=config.network,
            task="text-to-image" if config.network == "mmdit" else "unconditional-image-generation",
            shape=shape + (f" of the VAE {plain(vae)}" if vae else ""),
            path=origin.loaded.path, weights="averaged (EMA)" if weights == "ema" else "raw", step=origin.loaded.step,
            remarks="".join(remarks),
        ),
        USE[form, config.network].format(
            name=name, classes=config.num_classes, path=origin.loaded.path, cfg=cfg, call=call, without=without,
            network=config.network, encoder=text.encoder or "the training's encoder", length=config.text_length,
            mask=text.mask, texts=PROMPTS,
        ),
    ]  # fmt: skip
    if names and config.num_classes > 1:
        parts.append(_classes(names))
    arm = _arm(origin)
    if arm is None or recipe is None or origin.run is None:
        parts.append(_foreign(origin))
    else:
        scores = _scores(origin.run / origin.stage / "samples", arm)
        parts += [_training(origin, recipe, arm), _costs(arm), scores, f"## Recipe\n\n```toml\n{to_toml(recipe)}```\n"]
    whole = ABSOLUTE.sub(lambda found: f"./{Path(found[0]).name}", "\n".join(parts))  # paths of this machine
    return f"{whole}\nWritten by st_fast {__version__} from the run's own records.\n"


def class_names(recipe: Recipe) -> tuple[str, ...]:
    """The names of the data's classes; none where it has none, or is not at hand."""
    try:
        names = read_any_manifest(Path(recipe.data.path)).class_names
    except UserError:
        return ()
    return names if len(names) == recipe.model.num_classes else ()


def _classes(names: Sequence[str]) -> str:
    """The classes by number, NAMED at most."""
    rows = "".join(f"| {number} | {plain(name)} |\n" for number, name in enumerate(names[:NAMED]))
    more = f"\nAnd {len(names) - NAMED:,} more, in the data's manifest.json.\n" if len(names) > NAMED else ""
    return f"## Classes\n\n| number | class |\n|---|---|\n{rows}{more}"


def _states(text: TextStates, length: int, width: int) -> str:
    """What states of captions a model takes, in a few words."""
    whose = f"of {plain(text.encoder)}, " + ("padding masked" if text.mask else "without an attention mask")
    if text.hash:
        whose += f", SHA-256 {plain(text.hash[:16])}…"
    return f"{length} states of {width} channels {whose if text.encoder else 'of an encoder that is not recorded'}"


ABSOLUTE = re.compile(r'(?<=["`])/[^"`\n]*(?=["`])|(?<![\w./:])/[\w.+~-]+(?:/[\w.+~-]+)+')
"""An absolute path: anything in quotes; elsewhere at least two parts, of characters that need no quotes."""


def _arm(origin: ModelSource) -> Arm | None:
    """The logged stage that the model comes from; None for a file, or where there is no log."""
    if origin.run is None or not (origin.run / "log.jsonl").is_file():
        return None
    return next((arm for arm in make_arms([read_run(origin.run)]) if arm.stage.name == origin.stage), None)


def _training(origin: ModelSource, recipe: Recipe, arm: Arm) -> str:
    stage = arm.stage
    versions = dict(stage.start.get("versions", {})).items()
    lines = [
        "## Training", "",
        f"- Stage “{plain(stage.name)}” of the recipe below, supervision {code(stage.method)}, step "
        f"{origin.loaded.step:,} of {stage.steps:,}, global batch {recipe.optim.batch_size}, seed {recipe.run.seed}.",
        f"- Data: {_data(Path(recipe.data.path), str(stage.start.get('dataset', '')))}",
        f"- Device: {plain(stage.start.get('device', 'not recorded'))}, {plain(stage.start.get('ranks', 1))} rank(s), "
        + ", ".join(f"{plain(key)} {plain(value)}" for key, value in versions) + ".",
    ]  # fmt: skip
    if teacher := stage.model("teacher"):
        lines.append(f"- Teacher: {code(teacher)}, frozen.")
    init = stage.start.get("init")
    if isinstance(init, dict):
        lines.append(
            f"- Began from {code(init.get('path'))} ({plain(init.get('layout'))} layout, {plain(init.get('weights'))} "
            f"weights, its step {plain(init.get('step'))}, SHA-256 {plain(str(init.get('sha256'))[:16])}…)."
        )
    return "\n".join(lines) + "\n"


def _data(folder: Path, digest: str) -> str:
    try:
        manifest = read_any_manifest(folder)
    except UserError:
        return f"not at hand any more; digest {plain(digest[:16]) or 'not recorded'}…."
    classes = f" of {manifest.num_classes} classes" if manifest.num_classes > 1 else ""
    return (
        f"{plain(manifest.source)}, {manifest.count:,} records{classes}, VAE "
        f"{plain(manifest.vae.name)}, digest {plain(digest[:16])}…."
    )


def _costs(arm: Arm) -> str:
    unknown = "" if arm.total.known else " What a model before it cost isn't recorded, so the sums are lower bounds."
    return "\n".join([
        "## Cost", "",
        "| | FLOPs | training time |", "|---|---|---|",
        f"| this stage, teacher's forward passes included | {words.flops(arm.own.flops)} | "
        f"{words.duration(arm.own.seconds) or '0 s'} |",
        f"| training what it learnt or began from | {words.flops(arm.teacher.flops)} | "
        f"{words.duration(arm.teacher.seconds) or '0 s'} |",
        f"| in all | {str(arm.total).replace(' and ', ' | ')} |", "",
        f"One multiply-add is two FLOPs.{unknown}", "",
    ])  # fmt: skip


def _scores(samples: Path, arm: Arm) -> str:
    """Every score that was logged last or lies beside the stage's sample sets, a table for each protocol."""
    found: list[tuple[int, Mapping[str, Any], str]] = []
    if arm.stage.evals:
        found += _in_training(arm.stage.evals[-1])
    for file in sorted(samples.glob("*/metrics*.json")):
        record = read_json(file)
        drawn = record.get("samples", {})
        told = [f"{key} {value}" for key, value in dict(record.get("protocol", {})).items()]
        keys = (
            "sampler", "steps", "shift", "cfg_scale", "guidance", "cfg_range", "internal_guidance", "internal_range",
            "weights", "seed",
        )  # fmt: skip
        told += [f"{key} {drawn[key]}" for key in keys if key in drawn]
        scored = dict(record.get("metrics", {}))
        numbers = {re.sub("^judge_", "classifier_", key): value for key, value in scored.items()}  # an older name
        floors = {METRICS[key].floor: n for key, n in dict(record.get("real_images", {})).items() if key in METRICS}
        found.append((int(record.get("step") or 0), numbers | floors, ", ".join(told)))
    if not found:
        return "## Scores\n\nNone were taken.\n"
    lines = ["## Scores", ""]
    for step, metrics, how in found:
        of_samples, of_real = apart(metrics)
        real = {name: f"{of_real[key]:.5g}" for name in of_samples if (key := metric_of(name)) in of_real}
        lines += [f"Step {step:,}; {plain(how)}:", "", f"| score | samples |{' held-out real images |' * bool(real)}"]
        lines += ["|---|---|---|" if real else "|---|---|"]
        for name, value in of_samples.items():
            lines.append(f"| {plain(name)} | {value:.5g} |" + (f" {real.get(name, '')} |" if real else ""))
        lines.append("")
    return "\n".join(lines)


def _in_training(record: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any], str]]:
    """An evaluation of the log: the classifier's scores and Inception's apart, as each has a protocol of its own."""
    metrics, step = dict(record.get("metrics", {})), int(record["step"])
    keys = ("num", "sampler", "steps", "shift", "cfg_scale", "guidance", "internal_guidance")
    how = ", ".join(f"{key} {metrics[key]}" for key in keys if key in metrics)

    def among(features: str) -> dict[str, Any]:
        keys = [metric.key for metric in METRICS.values() if metric.features == features]
        names = [name for key in keys for name in (key, f"{key}_std", METRICS[key].floor)]
        return {name: metrics[name] for name in names if name in metrics}

    found: list[tuple[int, Mapping[str, Any], str]] = []
    if digest := metrics.get("classifier_digest"):
        found.append((step, among("classifier"), f"{how}; features of a small classifier {digest[:12]}, not FID"))
    if "fid" in metrics:
        weights = f"InceptionV3 {str(metrics.get('inception_sha256'))[:12]}"
        found.append((step, among("inception"), f"{how}; features of {weights}, reference {metrics.get('reference')}"))
    return found


def _foreign(origin: ModelSource) -> str:
    args = {key: value for key, value in dict(origin.loaded.facts.get("args", {})).items() if value is not None}
    text = (
        "## Training\n\nNot trained by a run whose log is at hand, so its data, cost and scores are unknown here. Read "
        f"from {code(origin.path.name)} in the {origin.loaded.layout} layout.\n\n"
    )
    text += f"```json\n{json.dumps(origin.loaded.config.described(), indent=1)}\n```\n"
    return text + (f"\nIts file says of itself:\n\n```json\n{json.dumps(args, indent=1)}\n```\n" if args else "")
