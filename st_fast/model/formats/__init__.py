"""Other projects' checkpoints: read strictly into one neutral form, and written back.

`loaded_state` is that form; `layouts` knows keys and shapes; `official` maps official SiT's time and sign; `modern`
knows what LightningDiT's and SpeedrunDiT's files hold beside a network; `adam` names the optimiser's state by key;
`st_fast.model.stored` reads what lies at a path, ours included.
"""

from st_fast.model.formats.importing import import_file
from st_fast.model.formats.loaded_state import LoadedState

__all__ = ["LoadedState", "import_file"]
