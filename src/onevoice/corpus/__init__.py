"""Speech we have: which recordings belong to whom, and the packs that training reads from.

In: folders, tar shards and manifests. Out: a `listing.Corpus`, or a `pack.PackedCorpus` on disk.
This room does not know what a mixture, a network or a training run is.
"""
