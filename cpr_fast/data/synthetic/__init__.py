"""The synthetic action videos of the demo: motions, scenes, rendering, and the data set.

Imports `data.index` and below; experiments, commands and tests may import it.
"""
