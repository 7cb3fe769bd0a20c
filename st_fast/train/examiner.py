"""Previews and metrics of a model while it trains: samples from fixed noise and labels, as pictures and scores.

They never end training: one that fails is a line. A signal ends them at once, and the resume makes what is missing.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from st_fast.core.checkpoint.store import candidates
from st_fast.core.errors import Stopped, UserError, first_line
from st_fast.core.machine import lacks_memory, out_of_memory
from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopRequest
from st_fast.data.manifest import Manifest
from st_fast.evaluate import attributes, classifier, scores
from st_fast.evaluate.inception import Inception, load_inception
from st_fast.model import DiffusionTransformer
from st_fast.recipe.schema import Recipe, Stage
from st_fast.report.metrics import summary
from st_fast.sample.contrast import Correction
from st_fast.sample.draw import names_in_turn
from st_fast.sample.guided import sample_batches, torchdiffeq_odeint
from st_fast.sample.model import Decode, decoder, load_prompts
from st_fast.sample.previews import png, sheet
from st_fast.sample.prompts import EncodedPrompts, Prompts, checked_prompts
from st_fast.sample.request import TextRequest
from st_fast.train.log import Log

Kind = Literal["sample", "eval"]
"""Of the log's records on pictures and on scores."""


def due(step: int, every: int) -> bool:
    """Whether something happens after this many steps; 0: never."""
    return every > 0 and step % every == 0


class Examiner:
    """Samples and scores on the first rank; classifier and Inception are loaded on first use.

    `stop` is asked to let a signal end the work. `decode`: what a program gave in place of the VAE.
    """

    def __init__(
        self, recipe: Recipe, manifest: Manifest, ranks: Ranks, log: Log, stop: StopRequest | None = None,
        decode: Decode | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.manifest, self.ranks, self.log = recipe, manifest, ranks, log
        self._stop = StopRequest() if stop is None else stop
        self._reference = Path(recipe.evaluate.reference or recipe.data.path)
        self.protocol: dict[str, str] = {}
        """SHA-256 of what scores depend on beside the samples, once it was checked."""
        self._inception: tuple[Inception, scores.Reference] | None = None
        self._own_decode = decode

    def check(self) -> None:
        """UserError for what samples and scores need and isn't there or doesn't fit, before days are spent.

        Where the run has begun, that is one line: nothing that is trained waits for a picture.
        """
        try:
            self._check()
        except UserError as error:
            out = Path(self.recipe.run.out)
            if not any(candidates(out / stage.name / "checkpoints") for stage in self.recipe.stages):
                raise
            self.log.say(f"{error}; training goes on without")

    def _check(self) -> None:
        wanted, settings, data = self.recipe.evaluate, self.recipe.sample, Path(self.recipe.data.path)
        if wanted.classifier and self._draws_text:
            attributes.check_pictures(data)
        elif wanted.classifier:
            known, classes = classifier.read_images(data).num_classes, self.recipe.model.num_classes
            classifier.check_real_images(data)
            if known < classes:  # samples are of every class of the model
                found = f"the real images in {data} are of classes 0..{known - 1}"
                asked = f"the model's samples of 0..{classes - 1} (--model.num_classes={known})"
                raise UserError(f"evaluate.classifier: {found}, {asked}")
        if wanted.inception:
            self.protocol["inception_sha256"] = load_inception(Path(wanted.inception), torch.device("cpu")).sha256
        if not self._kinds():
            return
        if settings.sampler == "dopri5":
            torchdiffeq_odeint()
        if settings.num:
            _ = self._prompts
        if "eval" in self._kinds():
            _ = self._scored
        try:
            decode = self._decode
        except UserError as error:
            without = ", or --sample.num=0 for no pictures" if self._kinds() == ("sample",) else ""
            raise UserError(f"{error}; --sample.vae names another folder{without}") from None
        if wanted.inception:
            model = self.recipe.model
            latents = torch.zeros(1, *model.latent_shape, device=self.ranks.device)
            self.protocol["reference_sha256"], *_ = scores.open_reference(
                self._reference, scores.InMemory(decode(latents).cpu().numpy()).shape
            )

    def _kinds(self) -> tuple[Kind, ...]:
        """What is ever made."""
        scored = self.recipe.evaluate.classifier or bool(self.recipe.evaluate.inception)
        return (*(("sample",) if self.recipe.sample.num else ()), *(("eval",) if scored else ()))

    def due(self, stage: Stage, step: int) -> tuple[Kind, ...]:
        """What is to be made after this many steps of the stage: the same on every rank."""
        every, last = {"sample": self.recipe.sample.every, "eval": self.recipe.evaluate.every}, step >= stage.steps
        return tuple(kind for kind in self._kinds() if last or due(step, every[kind]))

    def missing(self, stage: Stage, step: int) -> tuple[Kind, ...]:
        """The part of it that the log does not have, unless the stage has ended without it. On the first rank."""
        if self.log.has("end", stage.name):
            return ()
        return tuple(kind for kind in self.due(stage, step) if not self.log.has(kind, stage.name, step))

    def examine(
        self, wanted: Sequence[Kind], model: DiffusionTransformer, stage: Stage, step: int, cost: dict[str, float],
        correction: Callable[[], Correction | None] = lambda: None,
    ) -> None:  # fmt: skip
        """Makes what is wanted, on the first rank. A signal ends it; what fails otherwise is one line."""
        if not self.ranks.first:
            return
        for kind in wanted:
            try:
                with self._stop.interruptible():
                    (self.pictures if kind == "sample" else self.metrics)(model, stage, step, cost, correction())
            except Stopped:
                return
            except Exception as error:  # whatever it is, training need not end for it
                what = "no picture" if kind == "sample" else "no score"
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
                if lacks_memory(error):
                    reason = out_of_memory(error, "drawing" if kind == "sample" else "drawing and scoring")
                self.log.say(f"{stage.name} {step}: {what}: {reason}; training goes on")

    @cached_property
    def _decode(self) -> Decode:
        vae = self.recipe.sample.vae
        if self._own_decode is not None:
            return self._own_decode
        return decoder(Path(self.recipe.data.path), self.manifest, self.ranks.device, vae, self.log.say)

    @cached_property
    def _prompts(self) -> Prompts | None:
        """What a network that draws from text draws: the recipe's prompts, or as many captions as there are samples."""
        if not self._draws_text:
            return None
        own = self.recipe.sample.prompts
        texts = checked_prompts(own, "sample.prompts") if own else ()
        text = TextRequest(tuple(texts), captions=self.recipe.sample.num)
        found = load_prompts(text, self.recipe, self.ranks.device, self.log.say)
        if isinstance(found, EncodedPrompts):
            found.read_all()  # the encoder may be larger than the model
        return found

    @cached_property
    def _classifier(self) -> tuple[classifier.Classifier, classifier.Reference]:
        return classifier.load_classifier(Path(self.recipe.data.path), self.log.say)

    @property
    def _draws_text(self) -> bool:
        return not self.recipe.model.by_class

    def images(
        self, model: DiffusionTransformer, count: int, prompts: Prompts | None = None,
        correction: Correction | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """uint8 images (count, 1 or 3, H, W) and their labels (count,), on the CPU; or of prompts, their numbers."""
        settings, images, labels = self.recipe.sample, [], []
        for latents, asked in sample_batches(
            model, self.recipe.run.seed, count, settings, self.recipe.flow.path, prompts, correction
        ):
            self.ranks.heartbeat.beat("sample")
            images.append(self._decode(latents).cpu())
            labels.append(asked.cpu())
        return torch.cat(images), torch.cat(labels)

    def pictures(
        self, model: DiffusionTransformer, stage: Stage, step: int, cost: dict[str, float],
        correction: Correction | None = None,
    ) -> None:  # fmt: skip
        """A grid of samples into the stage's folder, of the same noise every time."""
        prompts = self._prompts
        images, labels = self.images(model, self.recipe.sample.num, prompts, correction)
        known = self.manifest.class_names if prompts is None else prompts.texts
        names = names_in_turn(
            labels[: self.recipe.model.num_classes if prompts is None else len(known)].tolist(), known
        )
        shown: dict[str, object] = {"classes" if prompts is None else "prompts": names} if names else {}
        if prompts is not None:
            shown["source"] = self.manifest.source  # names the licence of pictures that have one
        name = f"{stage.name}/samples/{step:08d}.png"
        self.log.files.write(Path(self.recipe.run.out) / name, png(sheet(images, labels.tolist(), prompts)))
        self.log.write("sample", stage.name, step, file=name, **shown, **cost)

    def metrics(
        self, model: DiffusionTransformer, stage: Stage, step: int, cost: dict[str, float],
        correction: Correction | None = None,
    ) -> None:  # fmt: skip
        """Metrics of fresh samples into the log: the classifier's, Inception's, or both, as the recipe says."""
        wanted, settings = self.recipe.evaluate, self.recipe.sample
        drawn = [self.images(model, count, prompts, correction) for count, prompts in self._scored]
        images, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        found, beside = dict[str, object](num=len(images)), dict[str, str]()
        if wanted.classifier and self._draws_text:
            classes, pictures = self._attributes
            pairs = zip(drawn, self._scored, strict=True)
            texts = [prompts.texts[i] for (_, asked), (_, prompts) in pairs if prompts for i in asked.tolist()]
            found |= attributes.metrics(attributes.prompt_scores(classes, pictures, images, texts))
            beside["file"] = f"{stage.name}/samples/{step:08d}-nearest.png"
            picture = png(attributes.nearest_sheet(pictures, images, texts))
            self.log.files.write(Path(self.recipe.run.out) / beside["file"], picture)
        elif wanted.classifier:
            network, reference = self._classifier
            found |= classifier.classifier_metrics(network, images, labels, reference)
        if wanted.inception:
            found |= self._by_inception(images)
        protocol: dict[str, object] = {"cfg_scale": settings.cfg_scale, "sampler": settings.sampler}
        protocol["steps"] = settings.steps
        if settings.shift != 1.0:
            protocol["shift"] = settings.shift
        if settings.guidance != "cfg":
            protocol["guidance"] = settings.guidance
        if settings.internal_guidance != 1.0:
            protocol["internal_guidance"] = settings.internal_guidance
        self.log.write("eval", stage.name, step, metrics=found | protocol, **beside, **cost)
        against = f" against {found['reference']}" if "reference" in found else ""
        self.log.say(f"{stage.name} {step}: {summary(found)}, of {len(images)} samples{against}")

    @cached_property
    def _scored(self) -> list[tuple[int, Prompts | None]]:
        """How many samples are scored of which prompts; with attributes half are of the captions held out."""
        wanted, data = self.recipe.evaluate, Path(self.recipe.data.path)
        if not self._draws_text:
            return [(wanted.num, None)]
        places = [(wanted.num, Path(wanted.captions or data))]
        if wanted.classifier:
            places = [(wanted.num - wanted.num // 2, data), (wanted.num // 2, data / attributes.HELD_OUT)]
        return [
            (number, load_prompts(TextRequest((), number, place), self.recipe, self.ranks.device, self.log.say))
            for number, place in places
        ]

    @cached_property
    def _attributes(self) -> tuple[attributes.AttributeClassifier, attributes.Pictures]:
        data = Path(self.recipe.data.path)
        return attributes.load_attribute_classifier(data, self.log.say), attributes.read_pictures(data)

    def _by_inception(self, images: Tensor) -> dict[str, object]:
        """FID and its like; the classifier's precision and recall keep their names, Inception's get a prefix."""
        samples = scores.InMemory(images.numpy())
        if self._inception is None:
            network = load_inception(Path(self.recipe.evaluate.inception), self.ranks.device)
            # Each batch of images is a sign of life for the watchdog.
            network.model.register_forward_pre_hook(lambda *_: self.ranks.heartbeat.beat("sample"))
            self._inception = network, scores.read_reference(self._reference, network, samples.shape)
        network, reference = self._inception
        numbers = scores.score(samples, network, reference)
        return {
            **{f"inception_{key}" if key in ("precision", "recall") else key: n for key, n in numbers.items()},
            "reference": reference.name,
            "reference_sha256": reference.sha256,
            "inception_sha256": network.sha256,
        }
