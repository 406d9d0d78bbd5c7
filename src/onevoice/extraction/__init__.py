"""Using weights: find and load them, and extract a voice.

In: the name, path or hub address of weights, and recordings. Out: an `extractor.Extractor`, and the voice. This room
must not know training, trials or metrics.
"""
