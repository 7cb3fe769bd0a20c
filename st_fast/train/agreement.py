"""What all ranks must have in common before they train together: recipe, versions, and the content of what each reads.

Ranks tell one another by messages in the store in which they met, so that nothing which could hang depends on what is
compared. Only the first rank reads checkpoints, teachers and models to start from; these can't differ.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

import torch

from st_fast import __version__
from st_fast.core.errors import RunFailed, UserError
from st_fast.core.files import shown
from st_fast.core.joining import Attempt, join
from st_fast.core.machine import rank, rank_count
from st_fast.core.ranks import Ranks
from st_fast.data.ahead import RecordSet
from st_fast.recipe import Recipe
from st_fast.recipe.schema import SECTIONS
from st_fast.train.batches import open_image_features

Facts = Mapping[str, str]
ELSEWHERE = ("data.path", "validate.path")
"""Keys that may differ: each machine may have the data in another place, but the content must be the same."""
RECIPE = "recipe or version"
"""The topic of `of_recipe`."""
REFUSING = 30.0
"""Seconds that a rank with a wrong recipe waits for the others, to tell them."""
FILES, CONTENT = "data files", "data content"
LEAVING = 10.0
"""Seconds that a rank which is refused waits for the others to learn why."""
NAMED = 12
"""How many differences a message names."""


def of_recipe(recipe: Recipe) -> Facts:
    """Every key of the resolved recipe with its value, and the versions."""
    found = {"st_fast": __version__, "torch": torch.__version__}
    found |= {f"{name}.{key}": repr(v) for name in SECTIONS for key, v in vars(getattr(recipe, name)).items()}
    for number, stage in enumerate(recipe.stages, 1):
        own = {"name": stage.name, "supervision": type(stage.method).__name__, "steps": stage.steps}
        own |= vars(stage.method) | vars(stage.start) | vars(stage.contrastive) | vars(stage.routing)
        found |= {f"stage[{number}].{key}": repr(value) for key, value in own.items()}
    return {key: value for key, value in found.items() if key not in ELSEWHERE}


def of_data(recipe: Recipe, records: RecordSet) -> Facts:
    """Digests of the records and of every stage's image features, as this rank sees them."""
    found = {"data digest": records.digest}
    if records.files is not None:
        found |= {FILES: records.files.stat, CONTENT: records.files.content}
    for stage in recipe.stages:
        features = open_image_features(stage, recipe, records, torch.device("cpu"), torch.float32)
        found |= {f"stage.{stage.name} features[{n}]": digest for n, digest in enumerate(features.digests)}
        features.close()
    return found


def agree(ranks: Ranks, topic: str, say: Callable[[], Facts], patience: float) -> None:
    """Every rank's facts must be the same. UserError, on all ranks the same line, names what differs and on whom.

    Also where `say` raises one on any of them. RunFailed where a rank does not answer.
    """
    attempt = ranks.attempt
    if attempt is None:
        say()
        return
    facts: dict[str, str] = {}
    error = None
    try:
        facts = dict(say())
    except UserError as wrong:
        error = wrong
    told = json.dumps({"facts": facts, "error": str(error) if error else "", "code": error.exit_code if error else 0})
    ranks.heartbeat.beat("agree")
    if len(set(attempt.exchange(topic, hashlib.sha256(told.encode()).hexdigest(), patience))) > 1 or error:
        everyone = [json.loads(word) for word in attempt.exchange(f"{topic}, in full", told, patience)]
        refused = _errors(everyone) or _differences(topic, _placed([one["facts"] for one in everyone]))
        if refused is not None:
            _until_all_know(attempt, topic)
            raise refused


def refuse(error: UserError) -> NoReturn:
    """Ends this rank, and those that were given a sound recipe, with the error of one that was not."""

    def say() -> Facts:
        raise error

    with suppress(RunFailed, RuntimeError):
        attempt = join(rank(), rank_count(), REFUSING)
        agree(Ranks(attempt.rank, attempt.count, torch.device("cpu"), attempt=attempt), RECIPE, say, REFUSING)
    raise error


def _until_all_know(attempt: Attempt, topic: str) -> None:
    """Without torchrun the first rank keeps the store, which must not go before the others have read it."""
    with suppress(RunFailed, RuntimeError):
        attempt.exchange(f"{topic}, known", "", LEAVING)


def _errors(everyone: list[dict[str, str]]) -> UserError | None:
    wrong = {number: one["error"] for number, one in enumerate(everyone) if one["error"]}
    if not wrong:
        return None
    number, text = next(iter(wrong.items()))
    refused = UserError(
        text if len(set(wrong.values())) == 1 and len(wrong) == len(everyone) else f"rank {number}: {text}"
    )
    refused.exit_code = int(everyone[number]["code"])
    return refused


def _placed(everyone: list[dict[str, str]]) -> list[dict[str, str]]:
    """With the content of files in place of their sizes and times where any rank knows it: copies have other times."""
    known = {one[FILES]: one[CONTENT] for one in everyone if one.get(CONTENT)}
    return [
        {key: known.get(value, value) if key == FILES else value for key, value in one.items() if key != CONTENT}
        for one in everyone
    ]


def _differences(topic: str, everyone: list[dict[str, str]]) -> UserError | None:
    """One line with each rank's differences from the first."""
    first, lines = everyone[0], []
    for number, facts in enumerate(everyone[1:], 1):
        for key in sorted(first.keys() | facts.keys()):
            if facts.get(key) != first.get(key):
                lines.append(f"rank {number} has {key} = {_short(facts.get(key))}, rank 0 {_short(first.get(key))}")
    if not lines:
        return None
    more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return UserError(
        f"the ranks were started with another {topic}: {'; '.join(lines[:NAMED])}{more}. Start all with the same "
        "command, versions and data"
    )


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value[:12] if len(value) == 64 and value.isalnum() else shown(value).strip("'\"")[:80]
