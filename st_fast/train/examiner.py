"""Previews and metrics of a model while it trains: samples from fixed noise and labels, as pictures and scores."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from st_fast.core.ranks import Ranks
from st_fast.data.manifest import Manifest
from st_fast.evaluate import classifier, scores
from st_fast.evaluate.inception import Inception, load_inception
from st_fast.model import SiT
from st_fast.recipe.schema import Recipe, Stage
from st_fast.report.metrics import summary
from st_fast.sample.guided import sample_batches
from st_fast.sample.model import Decode, decoder
from st_fast.sample.previews import grid, save_png
from st_fast.train.log import Log


class Examiner:
    """Samples and scores on the first rank; decoder, classifier and Inception are loaded on first use."""

    def __init__(self, recipe: Recipe, manifest: Manifest, ranks: Ranks, log: Log) -> None:
        self.recipe, self.manifest, self.ranks, self.log = recipe, manifest, ranks, log
        self._reference = Path(recipe.evaluate.reference or recipe.data.path)
        self.protocol: dict[str, str] = {}
        """SHA-256 of what scores depend on beside the samples, once it was checked."""
        self._inception: tuple[Inception, scores.Reference] | None = None

    def check(self) -> None:
        """UserError for images, weights or a reference that aren't there or don't fit, before days are spent."""
        wanted = self.recipe.evaluate
        if wanted.classifier:
            classifier.read_images(Path(self.recipe.data.path))
        if wanted.inception:
            self.protocol["inception_sha256"] = load_inception(Path(wanted.inception), torch.device("cpu")).sha256
            model = self.recipe.model
            latents = torch.zeros(1, model.channels, model.latent_size, model.latent_size, device=self.ranks.device)
            self.protocol["reference_sha256"], *_ = scores.open_reference(
                self._reference, scores.InMemory(self._decode(latents).cpu().numpy()).shape
            )

    @cached_property
    def _decode(self) -> Decode:
        return decoder(Path(self.recipe.data.path), self.manifest, self.ranks.device)

    @cached_property
    def _classifier(self) -> tuple[classifier.Classifier, classifier.Reference]:
        return classifier.load_classifier(Path(self.recipe.data.path), self.log.say)

    def images(self, model: SiT, count: int) -> tuple[Tensor, Tensor]:
        """uint8 images (count, 1 or 3, H, W) and their labels (count,), on the CPU."""
        settings, images, labels = self.recipe.sample, [], []
        for latents, asked in sample_batches(model, self.recipe.run.seed, count, settings, self.recipe.flow.path):
            self.ranks.heartbeat.beat("sample")
            images.append(self._decode(latents).cpu())
            labels.append(asked.cpu())
        return torch.cat(images), torch.cat(labels)

    def pictures(self, model: SiT, stage: Stage, step: int, cost: dict[str, float]) -> None:
        """A grid of samples into the stage's folder, of the same noise every time; none if `sample.num` is 0."""
        if self.recipe.sample.num == 0 or not self.ranks.first:
            return
        images, _ = self.images(model, self.recipe.sample.num)
        name = f"{stage.name}/samples/{step:08d}.png"
        save_png(grid(images), Path(self.recipe.run.out) / name)
        self.log.write("sample", stage.name, step, file=name, **cost)

    def metrics(self, model: SiT, stage: Stage, step: int, cost: dict[str, float]) -> None:
        """Metrics of fresh samples into the log: the classifier's, Inception's, or both, as the recipe says."""
        wanted, settings = self.recipe.evaluate, self.recipe.sample
        if not self.ranks.first or (not wanted.classifier and not wanted.inception):
            return
        images, labels = self.images(model, wanted.num)
        found: dict[str, object] = {"num": len(images)}
        if wanted.classifier:
            network, reference = self._classifier
            found |= classifier.classifier_metrics(network, images, labels, reference)
        if wanted.inception:
            found |= self._by_inception(images)
        protocol = {"cfg_scale": settings.cfg_scale, "sampler": settings.sampler, "steps": settings.steps}
        self.log.write("eval", stage.name, step, metrics=found | protocol, **cost)
        against = f" against {found['reference']}" if "reference" in found else ""
        self.log.say(f"{stage.name} {step}: {summary(found)}, of {len(images)} samples{against}")

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
