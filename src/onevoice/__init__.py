"""Target speaker extraction: a recording of several people and a few seconds of one in, that voice out."""
