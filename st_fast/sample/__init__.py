"""Drawing samples: the solvers, what is drawn, sets of samples that any number of ranks draw together, their files."""
