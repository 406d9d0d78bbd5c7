"""Pages that show results: numbers, texts and audio in, one self-contained HTML page out.

A page opens from disk without a network, in light and dark, on a phone and by keyboard. This room has the pieces:
`charts` (lines, histogram, scatter), `players` (audio that is compared at the same position) and `page` (sections,
tables). It knows nothing of runs, networks or data sets; the rooms above it put their own pages together.
"""
