"""Another project's checkpoint file → the neutral form, with every key, shape and dtype checked.

Files are not believed: nothing in a pickle is ever executed.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import allowance, is_pickle, read_header, shown
from st_fast.core.pickled import Unread
from st_fast.core.torch_files import Choice, read_pickled
from st_fast.model.formats import adam, modern, official
from st_fast.model.formats.layouts import INTERNAL_KEY, check_table, detect, infer, optimised
from st_fast.model.formats.loaded_state import LoadedState
from st_fast.recipe.schema import Model

Which = Literal["raw", "ema"]
"""One of a file's two sets of weights: those that were trained, or their average."""
TABLES = ("", "model", "ema", "state_dict")
"""Where a file may have weights; "" is a bare state dict."""
OPTIMISERS = ("optimizer_states", "optimizer", "optim")
"""Where other programs than the published ones keep the optimiser's state."""
PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}
"""What args call the path of the flow, in lower case."""
PREDICTIONS = ("v", "velocity")
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What DistributedDataParallel, torch.compile, FSDP and checkpointing put into keys: in front, or before a block's."""
RAW = ("model", "net", "network", "denoiser", "diffusion_model")
AVERAGED = ("ema", "ema_model", "model_ema", "net_ema", "ema_net")
OWNERS = re.compile(rf"(?:(?:{'|'.join(RAW + AVERAGED)})\.)+")
"""How modules that hold a network, such as Lightning's, call it and its average."""
DECISIVE = ("model", "path_type", "prediction", "num_classes", "class_dropout_prob")
"""Of a file's args, those that its weights are read by."""


def import_file(
    path: Path, layout: str | None = None, number_of_heads: int | None = None, num_classes: int | None = None,
    otherwise: Model | None = None, only: Which | None = None, internal_head: int | None = None,
) -> LoadedState:  # fmt: skip
    """Reads a `.pt` or safetensors file; layout and model follow from keys and shapes where they are not given.

    `internal_head` is the block that Internal Guidance's head reads. `otherwise` has the heads, classes and tokens of a
    caption where the file tells them neither by shapes nor by args. With `only`, the optimiser's state is not read, nor
    of a `.pt` with two tables the other set of weights, which is on the meta device then. UserError in one line for
    whatever does not fit.
    """
    content, where = read_file(path, only and partial(_unread, only=only)), str(path)
    tables, prefixes = _tables(content, path)
    names = list(tables)
    args, ignored = _args(content.get("args"), path)
    args |= modern.config_args(content.get("config"))
    if content.get("ema") is not None and "ema" not in tables:
        ignored.append(f"ema is no table but {_kind(content['ema'])}, and is not read: the raw weights stand for it")
    args |= {} if num_classes is None else {"num_classes": num_classes}
    args |= {} if internal_head is None else {"internal_head": internal_head}
    chosen = next(name for name in ("model", "", "state_dict", "ema") if name in tables)
    layout, told = layout or detect(tables[chosen], args, where), dict[str, Any]()
    numbered, beside = optimised(tables[chosen]), dict[str, dict[str, Tensor]]()
    if layout == "self-flow":
        tables = {name: official.with_convolution(table, otherwise, where) for name, table in tables.items()}
    if layout in modern.LAYOUTS:
        told = modern.told(tables[chosen], layout, where)
        number_of_heads = number_of_heads or modern.head_count(tables[chosen], layout)
        parts = {name: modern.split(table, layout) for name, table in tables.items()}
        tables, beside = ({name: pair[part] for name, pair in parts.items()} for part in (0, 1))
    model = tables[chosen]
    config = infer(model, args, number_of_heads, where, otherwise, told)
    if internal_head is not None and not config.internal_head:
        raise UserError(f"{where}: internal_head = {internal_head}: it has no internal head (no {INTERNAL_KEY})")
    for name, table in tables.items():
        check_table(table, config, layout, f"{path} {name}".strip())
        if layout in modern.LAYOUTS:
            modern.check_beside(beside[name], config, layout, f"{path} {name}".strip())
    state, left_out = adam.NO_STATE, ""
    if only is None and "opt" in content and "model" in tables:
        state, left_out = _optimiser(content["opt"], numbered, where)
    elif others := [name for name in OPTIMISERS if name in content]:
        left_out = f"{others[0]} is not read, only opt"
    rest = {key: value for key, value in content.items() if key not in (*TABLES, "opt", "args")}
    facts: dict[str, Any] = {
        "tables": names,
        "prefixes": {name: prefix for name, prefix in prefixes.items() if prefix is not None},
        "unprefixed": [name for name, prefix in prefixes.items() if prefix is None],
        "args": args,
        "entries": {key: value for key, value in rest.items() if isinstance(value, (int, float, str))},
        "opt": state.settings,
    }
    if layout in official.LAYOUTS:
        facts["sigma"] = len(model[official.OUTPUT[1]]) == 2 * config.patch_values
    if layout in modern.LAYOUTS:
        beside = {"model": beside[chosen], "ema": beside.get("ema", beside[chosen])}
        means = {name: modern.split(getattr(state, name), layout) for name in adam.MEANS}
        state = state._replace(exp_avg=means["exp_avg"][0], exp_avg_sq=means["exp_avg_sq"][0])
        beside |= {name: others for name, (_, others) in means.items()}
        ignored += [modern.REMARK] * (layout == "speedrundit")
        if modern.plain_config(content.get("config")):
            facts["config"] = content.get("config")
    steps = rest.get("steps")
    loaded = LoadedState(
        config=config,
        layout=layout,
        model=model,
        ema=tables.get("ema", model),
        exp_avg=state.exp_avg,
        exp_avg_sq=state.exp_avg_sq,
        updates=state.updates,
        head_updates=state.updates,
        step=steps if isinstance(steps, int) and steps >= 0 else state.updates,
        path=_path(args, path),
        facts=facts,
        originals={f"{name}/{key}": tensor for name, table in beside.items() for key, tensor in table.items()},
        left_out=left_out,
        remarks=tuple(ignored),
    )
    return _from_official(loaded) if layout in official.LAYOUTS else loaded


def _from_official(loaded: LoadedState) -> LoadedState:
    """The tables turned into our convention, and the tensors that this changes kept aside."""
    tables = {name: getattr(loaded, name) for name in ("model", "ema", "exp_avg", "exp_avg_sq")}
    originals = dict(loaded.originals) | {
        f"{name}/{key}": table[key] for name, table in tables.items() for key in official.CHANGED if key in table
    }
    ours = {name: official.to_ours(table, loaded.config, name == "exp_avg_sq") for name, table in tables.items()}
    if loaded.ema is loaded.model:
        ours["ema"] = ours["model"]
    return replace(loaded, **ours, originals=originals)  # type: ignore[arg-type]


def _path(args: Mapping[str, Any], path: Path) -> str:
    if args.get("prediction", "v") not in PREDICTIONS:
        said = shown(args["prediction"])
        raise UserError(f"{path}: args.prediction = {said}: only a velocity ({', '.join(PREDICTIONS)})")
    name = str(args.get("path_type", "linear"))
    if name.lower() not in PATHS:
        raise UserError(f"{path}: args.path_type = {shown(name)}: one of {', '.join(PATHS)} can be read")
    return PATHS[name.lower()]


def _unread(content: Mapping[Any, Any], only: Which) -> list[str]:
    """The keys of a file that are not needed where only one set of weights is."""
    tables = [name for name in TABLES if isinstance(content.get(name), Mapping)]
    others = [name for name in tables if (name == "ema") != (only == "ema")] if "ema" in tables else []
    kept = [] if len(others) == len(tables) else others
    return [name for name in ("opt", *OPTIMISERS) if name in content] + kept


def read_file(path: Path, unread: Choice | None = None) -> dict[str, Any]:
    """Reads a `.pt` (by `read_pickled`, which executes nothing and leaves out `unread`) or safetensors file.

    A bare state dict is the entry "". UserError in one line for a file that is neither, is broken, or asks for anything
    else to be executed or built.
    """
    content: Any
    if is_pickle(path):
        content = read_pickled(path, unread)
    else:
        read_header(path)  # checked before the library maps it
        content = load_file(path)
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"{path}: holds {type(content).__name__}, expected a dict of tensors or of model, ema, opt, args"
        )
    return {"": content} if all(isinstance(value, Tensor) for value in content.values()) else dict(content)


class Room:
    """What the tables of a file may still take: tensors may share a storage, or be one element seen a billion times."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.seen, self.copied = path, size, size // 2

    def plain(self, tensor: Tensor) -> Tensor:
        """The tensor contiguous, half precision as float32; UserError where all of them would take too much."""
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        self.seen -= tensor.nbytes
        if half or not tensor.is_contiguous():
            self.copied -= tensor.nbytes * (2 if half else 1)
        if self.seen < 0 or self.copied < 0:
            raise UserError(f"{self.path}: its tensors are views that take many times the file's bytes")
        return (tensor.float() if half else tensor).contiguous()


def _tables(content: Mapping[str, Any], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str | None]]:
    """The file's tables by name with plain keys, and the prefix that all keys of each had; None where they differ.

    A table that holds a network and its average becomes the two tables "model" and "ema".
    """
    names = [name for name in TABLES if isinstance(content.get(name), Mapping)]
    if not names:
        raise UserError(f"{path}: has {shown(list(content))}, expected model or ema, or a bare state dict")
    tables, prefixes = dict[str, dict[str, Tensor]](), dict[str, str | None]()
    room = Room(path, allowance(path.stat().st_size))
    for name in names:
        where = f"{path} {name}".strip()
        parts, prefix = _table(content[name], where, room)
        if len(parts) > 1 and len(names) > 1:
            raise UserError(f"{where}: holds a model and its average, and beside it the file has {', '.join(names)}")
        for part, table in parts.items():
            called = part if len(parts) > 1 else name
            tables[called], prefixes[called] = table, prefix
    return tables, prefixes


def _table(raw: Mapping[Any, Any], where: str, room: Room) -> tuple[dict[str, dict[str, Tensor]], str | None]:
    """A table with plain keys: "model", the weights, and "ema", their average, where it holds both.

    Also what stands before all keys, None where that differs from key to key, or something was inside them. Half
    precision is widened, which loses nothing; any other dtype is left for `check_table` to refuse.
    """
    if strangers := [key for key, t in raw.items() if not isinstance(key, str) or not isinstance(t, Tensor)]:
        raise UserError(f"{where} holds more than tensors: {shown(strangers)}")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
    prefixes: set[str | None] = set()
    for key, tensor in raw.items():
        part, plain = _plain_key(key)
        prefixes.add(key.removesuffix(plain) if key.endswith(plain) else None)
        found = parts[part]
        if plain in found:
            raise UserError(f"{where}: {shown(plain)} occurs twice, with and without a prefix")
        found[plain] = room.plain(tensor)
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(found[plain]).all()):
            raise UserError(f"{where}: {shown(plain)} holds NaN or infinity")
    kept = {part: table for part, table in parts.items() if table}
    return kept or {"model": {}}, prefixes.pop() if len(prefixes) == 1 else None


def _plain_key(key: str) -> tuple[str, str]:
    """Whether a key is of the "model" or its average "ema", and the key as the network itself has it."""
    plain = WRAPPERS.sub("", key)
    if not (match := OWNERS.match(plain)):
        return "model", plain
    averaged = any(name in AVERAGED for name in match[0].split("."))
    return "ema" if averaged else "model", plain[match.end() :]


def _args(said: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The plain values of a file's args, and a remark on what of them is left out.

    UserError where one that the weights are read by is no plain value.
    """
    table = vars(said) if isinstance(said, argparse.Namespace) else said
    if not isinstance(table, Mapping):
        told = f"args are not read, an instance of {_kind(table)}: a linear path and a velocity are assumed"
        return {}, [] if table is None else [told]
    args = {key: value for key, value in table.items() if isinstance(key, str) and adam.plain(value)}
    if wrong := [key for key in DECISIVE if table.get(key) is not None and key not in args]:
        raise UserError(f"{path}: args.{wrong[0]} is an instance of {_kind(table[wrong[0]])}: a plain value is needed")
    unread = [str(key) for key, value in table.items() if isinstance(value, Unread)]
    return args, [f"args without {shown(unread)}, instances of classes that are not read"] if unread else []


def _kind(value: Any) -> str:
    """The name of a value's class, in print."""
    return shown(value.kind if isinstance(value, Unread) else type(value).__name__)


def _optimiser(opt: Any, weights: Mapping[str, Tensor], where: str) -> tuple[adam.AdamState, str]:
    """AdamW's state of the weights; or none, and why the one in the file is left out."""
    if opt is None or (isinstance(opt, (Mapping, list)) and not opt):
        return adam.NO_STATE, "opt is empty"
    if not isinstance(opt, Mapping):
        return adam.NO_STATE, f"opt is {type(opt).__name__}, no optimiser's state"
    try:
        state = adam.by_key(opt, optimised(weights), where)
    except UserError as error:
        return adam.NO_STATE, str(error).removeprefix(f"{where}: ")
    return state, "" if state.exp_avg else "opt is empty"
