"""The synthetic action videos of the demo: motions, scenes, rendering, and the data set.

Imports `runtime` and `data.index`; `experiments`, `commands` and tests may import it.
"""
