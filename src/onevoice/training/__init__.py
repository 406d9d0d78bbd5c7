"""Learning: an experiment in, a run folder with weights out.

In: an `experiment.Experiment`. Out: what `run.train` leaves in the run folder. This room does not know the command
line, and nothing that uses or judges weights imports it.
"""
