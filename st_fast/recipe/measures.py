"""What is measured of a model while it trains: scores of its samples, and its loss on held-out records. No torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from st_fast.core.options import BATCH_MOST, COUNT_MOST, SEED_MOST
from st_fast.recipe.error import wrong_value
from st_fast.recipe.keys import BelowOne, CountOrZero, NonNegative, PathText, between, fixed, free

CLASSIFIER_FEATURES, INCEPTION_FEATURES = 64, 2_048
"""Feature channels: a covariance, and so a Fréchet distance, needs more samples than that."""
BINS_MOST = 100


@dataclass(frozen=True)
class Evaluate:
    """Which metrics are taken of samples."""

    classifier: bool = free(False, "Score in the features of a classifier trained on the data's images.")
    every: CountOrZero = free(0, "Steps from one evaluation to the next; 0: only at a stage's end.")
    num: Annotated[int, between(1, COUNT_MOST)] = free(1_000, "Samples of an evaluation.")
    captions: PathText = free("", "Data folder whose captions MMDiT draws for scores; empty: the run's own.")
    inception: PathText = free("", 'File of the FID network\'s weights, for FID and its like; "": none.')
    reference: PathText = free(
        "", "What FID compares with: ADM's .npz, pictures or a data folder; \"\": the run's data."
    )

    def check(self) -> None:
        """RecipeError for fewer samples than metrics need, or a reference where no FID is computed."""
        features = INCEPTION_FEATURES if self.inception else CLASSIFIER_FEATURES if self.classifier else 0
        if self.num <= features:
            why = f"a Fréchet distance in {features} features needs more samples"
            raise wrong_value("evaluate.num", self.num, f"at least {features + 1}", why)
        if self.reference and not self.inception:
            allowed = "empty, or evaluate.inception = the FID network's weights beside it"
            raise wrong_value("evaluate.reference", self.reference, allowed, "nothing is compared with it")


@dataclass(frozen=True)
class Validate:
    """The denoising loss on held-out records by time, and when it ends a stage (docs/training.md)."""

    every: CountOrZero = free(0, "Steps from one validation to the next, with one at a stage's end; 0: none.")
    path: PathText = free("", 'Folder of held-out latents; "": `share` of the training data.')
    share: BelowOne = fixed(0.0, "Share of the training data that is held out of training.")
    split_seed: Annotated[int, between(0, SEED_MOST)] = fixed(
        0, "Seed of what is held out, and of the times and noise of a validation; `run.seed` has no part in them."
    )
    num: Annotated[int, between(1, COUNT_MOST)] = free(1_000, "Records of a validation at most.")
    train: bool = free(True, "Take the loss on as many training records, too, to see where the model overfits.")
    bins: Annotated[int, between(1, BINS_MOST)] = free(10, "Equal bins of time, with as many records each.")
    weights: Literal["ema", "raw", "both"] = free("ema", "Of the average or the raw weights; both: the average counts.")
    batch_size: Annotated[int, between(1, BATCH_MOST)] = free(64, "Records of a forward pass.")
    patience: CountOrZero = free(0, "Validations in a row without a lower loss that end the stage; 0: none do.")
    min_delta: NonNegative = free(0.0, "How far below the lowest loss so far a loss must be to count as lower.")

    def check(self) -> None:
        """RecipeError where there is nothing to validate on, twice as much, or less than the bins need."""
        if self.path and self.share:
            why = f"validate.path = {self.path!r} names held-out records already"
            raise wrong_value("validate.share", self.share, "0, or validate.path left out", why)
        if self.every and not (self.path or self.share):
            allowed = "0, or validate.path = a folder of latents, or validate.share above 0 beside it"
            raise wrong_value("validate.every", self.every, allowed, "no record is held out")
        if self.num < self.bins:
            why = f"each of validate.bins = {self.bins} needs a record"
            raise wrong_value("validate.num", self.num, f"at least {self.bins}", why)
        if self.patience and not self.every:
            allowed = "0, or validate.every above 0 beside it"
            raise wrong_value("validate.patience", self.patience, allowed, "nothing is validated")
        if self.min_delta and not self.patience:
            allowed = "0, or validate.patience above 0 beside it"
            raise wrong_value("validate.min_delta", self.min_delta, allowed, "no stage ends by its loss")
