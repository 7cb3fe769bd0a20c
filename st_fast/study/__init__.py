"""Studies: many arms over several seeds from one file, carried out by one command, told by one table."""
