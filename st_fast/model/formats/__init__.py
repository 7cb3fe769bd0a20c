"""Other projects' checkpoints: read strictly into one neutral form, and written back.

`files` opens what may be hostile, `layouts` knows keys and shapes, `official` turns official SiT's time and sign round,
`adam` names the optimiser's moments, `bundle` is the neutral form.
"""

from st_fast.model.formats.importing import import_file
from st_fast.model.formats.layouts import LAYOUTS
from st_fast.model.formats.loaded_state import LoadedState

__all__ = ["LAYOUTS", "LoadedState", "import_file"]
