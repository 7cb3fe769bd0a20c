"""Other projects' checkpoints: read strictly into one neutral form, and written back.

`files` opens what may be hostile, `layouts` knows keys and shapes, `official` turns official SiT's time and sign round,
`adam` names the optimiser's moments, `bundle` is the neutral form.
"""

from st_fast.formats.bundle import Bundle
from st_fast.formats.exporting import export_file
from st_fast.formats.importing import import_file
from st_fast.formats.layouts import LAYOUTS

__all__ = ["LAYOUTS", "Bundle", "export_file", "import_file"]
