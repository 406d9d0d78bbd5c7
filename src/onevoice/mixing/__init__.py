"""Trials we make: who speaks with whom, at which level, in which room, as files or as batches of tensors.

In: speakers with their files, or packs. Out: a folder of trials (`generator`), or batches drawn at every step
(`draw`, `render`). This room does not know networks, training, or data sets that others mixed.
"""
