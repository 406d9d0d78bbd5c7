"""Speech we have: which recordings belong to which speaker, and the packs that training reads from.

In: folders, tar shards and manifests. Out: a `listing.Corpus`, or a `pack.PackedCorpus` on disk.
This room must not know about mixtures, networks or training runs.
"""
