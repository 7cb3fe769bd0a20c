"""What a recipe may say where it trains a module of one's own (`model.network = "own"`). Imports no torch."""

from st_fast.recipe.error import show, wrong_value
from st_fast.recipe.keys import keys
from st_fast.recipe.methods import supervision_name
from st_fast.recipe.schema import Model, Recipe

OF_ANY = {
    "name", "network", "channels", "latent_size", "num_classes", "class_dropout", "depth", "width", "heads", "patch",
    "own_blocks", "own_macs", "own_parameters", "own_bytes",
}  # fmt: skip
"""The keys of [model] that say something of any module; the others describe st_fast's own networks."""


def check_own(recipe: Recipe) -> None:
    """RecipeError for what only st_fast's own networks have: keys of [model], routes, compiled blocks, shards."""
    model = recipe.model
    if model.network != "own":
        for name in ("own_blocks", "own_macs", "own_parameters", "own_bytes"):
            if (value := getattr(model, name)) != keys(Model)[name].default:
                raise wrong_value(f"model.{name}", value, 'left out, or network = "own"')
        return
    why = 'model.network = "own"'
    for name, key in keys(Model).items():
        if name not in OF_ANY and (value := getattr(model, name)) != key.default:
            raise wrong_value(f"model.{name}", value, "left out", f"{why}: your module is what it is")
    for asked, value, usual in (
        ("optim.name", recipe.optim.name, "adamw"),
        ("run.compile", recipe.run.compile if recipe.run.compile == "on" else "auto", "auto"),
        ("run.checkpointing", recipe.run.checkpointing, "none"),
        ("run.sharding", recipe.run.sharding, "none"),
        ("run.fp8", recipe.run.fp8, "off"),
        ("sample.guidance", recipe.sample.guidance, "cfg"),
    ):
        if value != usual:
            raise wrong_value(asked, value, show(usual), f"{why}: it knows the blocks of st_fast's own networks alone")
    for stage in recipe.stages:
        method, name = stage.method, f"stage.{stage.name}"
        if stage.start.init:
            allowed = (
                "left out: a trained module is given as it is, Trainer(recipe, model=run.model().requires_grad_())"
            )
            raise wrong_value(f"{name}.init", stage.start.init, allowed, why)
        if stage.routing.route != "none":
            raise wrong_value(f"{name}.route", stage.routing.route, "none", f"{why}: blocks of it run all tokens")
        if method.stop_below != "off":
            raise wrong_value(f"{name}.stop_below", method.stop_below, '"off"', f"{why}: it is not cut in two")
        if method.token_groups is not None or method.network(model) != model:
            allowed = "a method that reads blocks: self_transcendence, velocity_head, layer_sync, sra, repa, given, …"
            raise wrong_value(
                f"{name}.supervision", supervision_name(method), allowed, f"{why}: it changes the network"
            )
