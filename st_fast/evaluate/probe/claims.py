"""What the paper claims (arXiv 2601.07773), and whether the models at hand show it, by rules stated here.

A difference counts where it is more than ERRORS standard errors of itself, both sides on the same held-out images and
the same noise. Models of one seed are compared, so a difference between two models is that of two trainings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from st_fast.evaluate.probe.examine import Findings
from st_fast.evaluate.probe.guided import Guidance, Guide
from st_fast.evaluate.probe.measures import Estimate
from st_fast.evaluate.probe.subjects import Subject

ERRORS = 2.0
Verdict = Literal["seen here", "not seen", "seen in part", "not tested", "not testable at this size"]
TOO_SMALL = (
    ("It surpasses REPA in quality and speed, and other methods without an encoder by far (ImageNet at 256 × 256: FID "
     "1.25 after 400 epochs of SiT-XL)", "abstract; code's page", "needs ImageNet and weeks of GPUs"),
    ("The same recipe helps text to image", "abstract", "needs captions and a larger model"),
    ("Its target is more discriminative and semantically richer than DINO's features, which REPA aligns with",
     "Fig. 1 right; code's page", "needs an encoder trained on large pictures, and such pictures"),
)  # fmt: skip
"""(claim, its place, why it can't be tested here)."""


@dataclass(frozen=True)
class Claim:
    """A row of the page."""

    claim: str
    place: str
    test: str
    found: str
    verdict: Verdict


@dataclass(frozen=True)
class Evidence:
    """All that was measured. `place` is that of the time at which the rules look, `time`."""

    models: Sequence[tuple[Subject, Findings]]
    guides: Sequence[tuple[Guide, Guidance]]
    place: int
    time: float

    def latest(self, role: str) -> list[tuple[Subject, Findings]]:
        """The models of a role, of each stage of each run the one with the most steps."""
        found: dict[object, tuple[Subject, Findings]] = {}
        for one in self.models:
            if one[0].role == role:
                key = one[0].run, one[0].stage.name
                known = found.get(key)
                if known is None or one[0].loaded["step"] > known[0].loaded["step"]:
                    found[key] = one
        return list(found.values())

    def teachers(self) -> list[tuple[Guide, Guidance, float]]:
        """Each guide that taught a model here, with the largest ω at which it did."""
        return [(guide, found, max(guide.students.values())) for guide, found in self.guides if guide.students]


Outcome = tuple[str, bool]
"""One comparison: a sentence with its figures, and whether the claim is seen in it."""


def decide(evidence: Evidence) -> list[Claim]:
    """Every claim with its verdict."""
    tests = (late, shallow, cleaner_stage_1, richer_stage_1, discriminative, of_the_image, clean, richer_student,
             cleaner_student)  # fmt: skip
    return [*(test(evidence) for test in tests),
            *(Claim(text, place, "–", why, "not testable at this size") for text, place, why in TOO_SMALL)]  # fmt: skip


def _claim(claim: str, place: str, test: str, outcomes: Sequence[Outcome], missing: str) -> Claim:
    """Seen where every comparison shows it, in part where some do; not tested where there is none, and why."""
    if not outcomes:
        return Claim(claim, place, test, missing, "not tested")
    right = [seen for _, seen in outcomes]
    verdict: Verdict = "seen here" if all(right) else "seen in part" if any(right) else "not seen"
    return Claim(claim, place, test, "; ".join(text for text, _ in outcomes), verdict)


def late(evidence: Evidence) -> Claim:
    """Needs a plain run at several steps."""
    outcomes: list[Outcome] = []
    for last, found in evidence.latest("plain"):
        same = [one for one in evidence.models if (one[0].run, one[0].role) == (last.run, "plain")]
        earlier = [one for one in same if one[0].loaded["step"] < last.loaded["step"]]
        low, high = _depths(evidence)
        if earlier and {low, high} <= set(found.blocks):
            first, before = min(earlier, key=lambda one: int(one[0].loaded["step"]))
            gains = [_at(found, evidence, "accuracy", block).over(_at(before, evidence, "accuracy", block))
                     for block in (low, high)]  # fmt: skip
            steps = f"steps {first.loaded['step']:,} to {last.loaded['step']:,}"
            outcomes.append(
                (f"{steps}: block {low} gains {_points(gains[0])}, block {high} {_points(gains[1])}",
                 gains[0].exceeds(gains[1], ERRORS))
            )  # fmt: skip
    return _claim(
        "In plain training deep blocks become discriminative early, shallow ones slowly", "abstract; Fig. 1 left",
        "linear probe of two blocks at several steps of a plain run: after the first step the shallow one gains more",
        outcomes, "needs checkpoints of a plain run at several steps",
    )  # fmt: skip


def shallow(evidence: Evidence) -> Claim:
    """Plain training's block that stage 2 would supervise, and the one whose features it would get."""
    low, high = _depths(evidence)
    outcomes = []
    for subject, found in evidence.latest("plain"):
        if not {low, high} <= set(found.blocks):
            continue
        a, b = (_at(found, evidence, "accuracy", block) for block in (low, high))
        outcomes.append((f"{subject.label}: block {high} {_share(b)}, block {low} {_share(a)}, {_difference(b, a)}",
                         b.exceeds(a, ERRORS)))  # fmt: skip
    return _claim(
        "Shallow blocks of a plainly trained model are less discriminative than deeper ones", "abstract; Fig. 1 left",
        f"linear probe: block {high} above block {low}", outcomes, "needs a plain run",
    )  # fmt: skip


def cleaner_stage_1(evidence: Evidence) -> Claim:
    """The block that stage 1's head reads."""
    return _against_plain(
        evidence, "stage 1", "clean", lambda subject: subject.supervised[:1],
        "Aligning a shallow block with the latents (stage 1) makes its features cleaner",
        "abstract; overview figure (a)", "R² of a linear map to the clean latent, at the block that stage 1 supervises",
    )  # fmt: skip


def richer_stage_1(evidence: Evidence) -> Claim:
    """The block that teaches."""
    return _against_plain(
        evidence, "stage 1", "accuracy", lambda _: (_depths(evidence)[1],),
        "The model of stage 1 has learnt more meaningful features, so it can teach",
        "abstract; overview figure (b)", "linear probe at the teacher's block",
    )  # fmt: skip


def richer_student(evidence: Evidence) -> Claim:
    """The block that stage 2 supervises."""
    return _against_plain(
        evidence, "stage 2", "accuracy", lambda subject: subject.supervised,
        "Stage 2 makes the student's shallow features more discriminative", "abstract; Fig. 1",
        "linear probe at the block that stage 2 supervises",
    )  # fmt: skip


def cleaner_student(evidence: Evidence) -> Claim:
    """The block that stage 2 supervises."""
    return _against_plain(
        evidence, "stage 2", "clean", lambda subject: subject.supervised,
        "Stage 2 helps the student's shallow blocks to tell noise from signal", "abstract (criterion 1)",
        "R² of a linear map to the clean latent, at the block that stage 2 supervises",
    )  # fmt: skip


def discriminative(evidence: Evidence) -> Claim:
    """The target of stage 2, told the true class."""
    outcomes, missing = [], "needs a stage 2 whose teacher is there"
    for guide, found, scale in evidence.teachers():
        a, b, c = (found.at("between_pooled", evidence.place, s) for s in (0.0, 1.0, scale))
        if not all(math.isfinite(one.value) for one in (a, b, c)):
            missing = "needs more held-out images than classes"
            continue
        outcomes.append((
            f"{guide.label}, block {guide.block}: {_share(a)} at ω = 0, {_share(b)} at 1, {_share(c)} at {scale:g}",
            c.exceeds(a, ERRORS) and c.exceeds(b, ERRORS),
        ))  # fmt: skip
    return _claim(
        "Guiding the teacher's features makes them more discriminative", "abstract (criterion 2)",
        "share of pooled features' variance between classes: higher at the student's ω than at ω = 0 and 1",
        outcomes, missing,
    )  # fmt: skip


def of_the_image(evidence: Evidence) -> Claim:
    """Our control: does the image's class become more visible, or only the label that was told?"""
    outcomes = []
    for guide, found, scale in evidence.teachers():
        a, c = (found.at("told_random", evidence.place, s) for s in (0.0, scale))
        told, image = (found.at(name, evidence.place, scale) for name in ("names_told", "names_image"))
        outcomes.append((
            f"{guide.label}: {_share(a)} at ω = 0, {_share(c)} at ω = {scale:g}, {_difference(c, a)}. Told another "
            f"class, a probe names that one for {_share(told)} of images and their own for {_share(image)}",
            c.exceeds(a, ERRORS),
        ))  # fmt: skip
    return _claim(
        "… and what guidance adds is semantics of the image, beyond the label that the teacher is told",
        "implied by “semantic expressiveness” (abstract); the control is ours",
        "linear probe on the image's class, the teacher told random labels: higher at the student's ω than at ω = 0",
        outcomes, "needs a stage 2 whose teacher is there",
    )  # fmt: skip


def clean(evidence: Evidence) -> Claim:
    """The target of stage 2: does guidance keep out the noise?"""
    outcomes = []
    for guide, found, scale in evidence.teachers():
        kept = {name: [found.at(name, evidence.place, s) for s in (0.0, scale)]
                for name in ("steady", "steady_within", "clean")}  # fmt: skip
        a, c = kept["steady"]
        within, fit = kept["steady_within"], kept["clean"]
        outcomes.append((
            f"{guide.label}: {_share(a)} at ω = 0, {_share(c)} at {scale:g}; within a class {_share(within[0])} and "
            f"{_share(within[1])}; R² to the clean latent {_plain(fit[0])} and {_plain(fit[1])}",
            c.exceeds(a, ERRORS) and not fit[0].exceeds(fit[1], ERRORS),
        ))  # fmt: skip
    return _claim(
        "The guided features are clean: they hold the image's structure, not the noise",
        "abstract (criterion 1); Fig. 1",
        "share of the variance that image and label decide: higher at the student's ω than at ω = 0, with an R² to the "
        "clean latent that is no lower", outcomes, "needs a stage 2 whose teacher is there",
    )  # fmt: skip


def _against_plain(
    evidence: Evidence, role: str, measure: str, blocks: Callable[[Subject], Sequence[int]], claim: str, place: str,
    test: str,
) -> Claim:  # fmt: skip
    """A measure of every model of a role against the first plain model's, at the same block.

    A model with more steps than the plain one is left out: it would be ahead without any method.
    """
    outcomes: list[Outcome] = []
    missing = f"needs a plain run and one of {role}"
    plain = evidence.latest("plain")[:1]
    for subject, found in evidence.latest(role) if plain else []:
        reference, (ahead, steps) = plain[0][1], (subject.loaded["step"], plain[0][0].loaded["step"])
        if ahead > steps:
            missing = (
                f"{subject.label} has had {ahead:,} steps and the plain run {steps:,}: that would be no comparison"
            )
            continue
        for block in blocks(subject):
            if block in found.blocks and block in reference.blocks:
                ours, theirs = (_at(one, evidence, measure, block) for one in (found, reference))
                if len(ours.parts) != len(theirs.parts):  # other tokens: not of the same images
                    continue
                percent = measure == "accuracy"
                write = _share if percent else _plain
                text = f"{subject.label}, block {block}: {write(ours)}, plain {write(theirs)}"
                text += f" after {ahead:,} and {steps:,} steps" * (ahead != steps)
                outcomes.append((f"{text}, {_difference(ours, theirs, percent)}", ours.exceeds(theirs, ERRORS)))
    return _claim(claim, place, f"{test}: above plain's", outcomes, missing)


def _depths(evidence: Evidence) -> tuple[int, int]:
    """The shallow block and the deep one that are compared: stage 2's, else the supervised one and the middle."""
    for subject, _ in evidence.latest("stage 2"):
        return subject.supervised[0], subject.stage.method.frozen_depth
    depth, known = evidence.models[0][0].model.config.depth, evidence.models[0][1].blocks[1:]
    taps = [subject.supervised[0] for subject, _ in evidence.models if subject.supervised]
    quarter, deep = (min(known, key=lambda block: abs(block - share * depth)) for share in (0.25, 0.67))
    return (taps or [quarter])[0], deep


def _at(found: Findings, evidence: Evidence, measure: str, block: int) -> Estimate:
    return found.at(measure, evidence.place, block)


def _share(one: Estimate) -> str:
    return f"{100 * one.value:.1f} %" if math.isfinite(one.value) else "–"


def _plain(one: Estimate) -> str:
    return f"{one.value:.3f}"


def _points(one: Estimate) -> str:
    return f"{100 * one.value:+.1f} ± {100 * one.error:.1f} points"


def _difference(one: Estimate, other: Estimate, percent: bool = True) -> str:
    """“+3.1 ± 1.2 points”: one less the other, and its standard error."""
    found = one.over(other)
    return _points(found) if percent else f"{found.value:+.3f} ± {found.error:.3f}"
