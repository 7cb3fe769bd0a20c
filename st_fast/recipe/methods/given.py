"""Settings of a stage whose supervision is a module that a program gives. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from st_fast.recipe.keys import Block, StageStep, fixed
from st_fast.recipe.methods.base import EVERYWHERE, Method, Selection


@dataclass(frozen=True)
class Given(Method):
    """A module of your own, from Python, adds its loss (`st_fast.Trainer(…, supervision=…)`, docs/python.md)."""

    implementation: ClassVar[str] = "st_fast.train.supervision.given:Given"

    student_depth: Block = fixed(8, "The student's block whose output your module reads.")
    stop_step: StageStep = fixed(0, "Supervision ends after this many steps; 0: with the stage.")

    @property
    def tap(self) -> int:
        return self.student_depth

    @property
    def selection(self) -> Selection:
        """All samples: the module has its own λ."""
        return Selection(EVERYWHERE, "sample", 1.0)
