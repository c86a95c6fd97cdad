"""The k nearest neighbours of every entry of a set among the others, exactly.

`knn_graph` is the function; `KnnGraph` is the same in steps, whose state can be stored between them. The lists are
those of `cascade_select` with one stage, bit for bit, and every pair is scored once on the CPU.
"""
