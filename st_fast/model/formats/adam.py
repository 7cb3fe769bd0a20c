"""torch.optim.AdamW's state dict, which numbers parameters, ↔ the same by key."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import shown

FIXED = ("pos_embed",)
"""Parameters that are handed to the optimiser but never trained."""
MEANS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter, beside its number of updates."""


class AdamState(NamedTuple):
    """AdamW's running means by key, and its number of updates."""

    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    updates: int
    settings: dict[str, Any]
    """The parameter group's plain settings: lr, betas and so on."""


NO_STATE = AdamState({}, {}, 0, {})


def by_key(opt: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> AdamState:
    """The state by key; parameters are numbered in the order of `weights`. `NO_STATE` where no update was made yet.

    UserError where it is another optimiser's, or number, shapes or update counts are not those of one AdamW over these
    weights.
    """
    state, groups = opt.get("state"), opt.get("param_groups")
    if isinstance(groups, Sequence) and len(groups) > 1:
        raise UserError(f"{where}: opt has {len(groups)} parameter groups, one of one AdamW is needed")
    group = groups[0] if isinstance(groups, Sequence) and len(groups) == 1 else None
    if not isinstance(state, Mapping) or not isinstance(group, Mapping):
        raise UserError(f"{where}: opt is no state of one AdamW with one parameter group")
    numbers = group.get("params")
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise UserError(f"{where}: opt names its parameters {shown(numbers)}, their numbers are needed")
    if len(numbers) != len(weights):
        raise UserError(f"{where}: opt has {len(numbers)} parameters, the model {len(weights)}")
    if not state:
        return NO_STATE
    exp_avg, exp_avg_sq, counts = {}, {}, set()
    for number, (key, weight) in zip(numbers, weights.items(), strict=True):
        if key in FIXED:
            continue
        entry = state.get(number)
        if isinstance(entry, Mapping) and not {*MEANS} & {*entry}:
            raise UserError(
                f"{where}: opt is another optimiser's: of {shown(key)} it keeps {shown(list(entry))}, AdamW "
                f"{' and '.join(MEANS)}"
            )
        if not isinstance(entry, Mapping) or not all(_fits(entry.get(k), weight) for k in MEANS):
            raise UserError(f"{where}: opt has no state of shape {tuple(weight.shape)} for {shown(key)}")
        exp_avg[key], exp_avg_sq[key] = entry["exp_avg"], entry["exp_avg_sq"]
        counts.add(updates(entry.get("step"), f"{where}: opt of {shown(key)}"))
    if len(counts) != 1:
        raise UserError(f"{where}: opt counts {shown(sorted(counts))} updates for different parameters, one is needed")
    settings = {key: value for key, value in group.items() if key != "params" and plain(value)}
    return AdamState(exp_avg, exp_avg_sq, counts.pop(), settings)


def state_dict(
    keys: Sequence[str], exp_avg: Mapping[str, Tensor], exp_avg_sq: Mapping[str, Tensor], updates: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What `AdamW(model.parameters()).state_dict()` is for parameters in the order of `keys`."""
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.empty(0)) for _ in keys], weight_decay=0.0).state_dict()
    group = fresh["param_groups"][0] | {k: tuple(v) if k == "betas" else v for k, v in settings.items()}
    state = {
        number: {"step": torch.tensor(float(updates)), "exp_avg": exp_avg[key], "exp_avg_sq": exp_avg_sq[key]}
        for number, key in enumerate(keys)
        if key in exp_avg
    }
    return {"state": state, "param_groups": [group]}


def updates(step: object, where: str) -> int:
    """AdamW's count of updates, a number or a tensor of one."""
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(value, (int, float)) or not 0 <= value < 2**53 or value != int(value):
        raise UserError(f"{where} has step {shown(value)}, a count of updates is needed")
    return int(value)


def _fits(mean: object, weight: Tensor) -> bool:
    return isinstance(mean, Tensor) and mean.shape == weight.shape and mean.dtype == torch.float32


def plain(value: object) -> bool:
    """Whether a value can stand in JSON: a number, text, None, or a list of numbers."""
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, (tuple, list)) and all(isinstance(item, (int, float)) for item in value))
    )
