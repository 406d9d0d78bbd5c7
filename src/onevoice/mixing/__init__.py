"""Trials we make: who speaks with whom, at which level, in which room.

In: speakers with their files, or packs. Out: a folder of trials (`generator`), or batches drawn at every step
(`draw`, `render`). This room must not know networks, training, or the data sets of others.
"""
