"""st_fast's kernels: ops that are one name on every device, and the choice, per op, between them and their definition.

    from st_fast import kernels
    table = kernels.select({"norm_modulate": "auto"}, torch.device("cuda"))
    y = table.norm_modulate(x, shift, scale, 1e-6)

Each op family is a folder: `definition.py` says in plain PyTorch what its ops compute, `triton.py` has the kernels for
CUDA (csrc/ those for the CPU), and `op.py` everything else, from the schema to the inputs that it is tried with. A
folder with an `op.py` is a family: nothing else lists them.

Importing this package imports no torch: the public functions come from their family when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.registry import Op
    from .table import KernelTable, select

_HERE = Path(__file__).parent

if __name__ == "kernels" and (_HERE.parent / "st_fast").is_dir():
    # Found through the current folder by something that looks for the Hugging Face package of this name. Ops may be
    # registered once only, and that is done as st_fast.kernels.
    from .namesake import stand_aside

    stand_aside()
else:
    FAMILIES = tuple(sorted(file.parent.name for file in _HERE.glob("*/op.py")))
    OPS: dict[str, str] = {}
    """The family of each public function."""
    SWITCHES: dict[str, str] = {}
    """What a recipe can switch, ops above all, with the sentence that explains the key."""
    FORMS: dict[str, tuple[str, ...]] = {}
    """Values of a key beside "auto", "fused" and "reference"."""
    for _family in FAMILIES:
        _package = import_module(f".{_family}", __name__)
        if not hasattr(_package, "OPS") or not hasattr(_package, "SWITCHES"):
            raise ImportError(f"{_HERE / _family}: __init__.py must have OPS and SWITCHES, as in the other families")
        for _op in _package.OPS:
            if _op in FAMILIES:
                raise ImportError(f"{_HERE / _op}: a folder can't have the name of an op, {_family}'s {_op}; rename it")
            if _op in OPS:
                raise ImportError(f"{_HERE}: {OPS[_op]} and {_family} both have an op {_op}; rename one of them")
            OPS[_op] = _family
        SWITCHES.update(_package.SWITCHES)
        FORMS.update(getattr(_package, "FORMS", {}))
    TABLE = tuple(op for op in OPS if op in SWITCHES)
    """The ops of a `KernelTable`."""

    __all__ = ["FAMILIES", "OPS", "SWITCHES", "TABLE", "KernelTable", "declared", "select", *OPS]

    def declared(op: str) -> Op:
        """What the family of an op says about it."""
        declarations: dict[str, Op] = import_module(f".{OPS[op]}.op", __name__).DECLARED
        if op not in declarations:
            raise ImportError(f"{_HERE / OPS[op]}: op.py has no {op} in DECLARED, but __init__.py in OPS")
        return declarations[op]

    def __dir__() -> list[str]:
        return [*__all__, "layers", "native", "ops", "patch", "reference", "table"]

    def __getattr__(name: str) -> Any:
        """A public function of a family, the table of kernels, or a module."""
        if name in OPS:
            found = globals()[name] = declared(name).call  # so that it is found at once the next time
            return found
        if name == "ops":  # torch.ops.st_fast, with every op in it
            for op in OPS:
                declared(op)
            return import_module("._ops", __name__).ops
        if name in ("KernelTable", "select"):
            return getattr(import_module(".table", __name__), name)
        if name in ("layers", "native", "patch", "reference", "table"):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
