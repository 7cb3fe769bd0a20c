"""Python imports this at every start where its folder is on PYTHONPATH: a process of a rehearsal, or a child of one."""

from tests.stand_in import gates

gates.disarm()
