"""Using weights: find and load them, and extract a voice.

In: a name, path or hub address of weights, and recordings. Out: an `extractor.Extractor`, and the voice.
This room does not know training, trials or metrics.
"""
