"""What `import kernels` gives in the root of this repository: the Hugging Face package of that name, or nothing.

Python looks into the current folder first, so that there `kernels` is this folder to every other package. diffusers
and transformers look for their own one, and import what they find.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def stand_aside() -> None:
    """Called while `kernels` is imported: puts the package of that name from elsewhere on `sys.path` in its place.

    Where there is none, an empty module stays, as an import that fails is more than those who look are prepared for.
    """
    name, root = __name__.partition(".")[0], Path(__file__).parent.parent.resolve()
    sys.modules.pop(__name__)
    spec = PathFinder.find_spec(name, [path for path in sys.path if Path(path).resolve() != root])
    if spec is None or spec.loader is None:
        return
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
