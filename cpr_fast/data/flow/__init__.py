"""TV-L1 optical flow of the videos of an index: computed, quantised and stored.

Imports `data.index` and below, and `ops`; clips, commands and reports may import it.
"""
