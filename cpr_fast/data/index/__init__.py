"""The index of a data set: its CSV file, the layouts of known data sets, and probing of every video.

Imports `data.storage` and `data.video`; flow, clips, training and evaluation may import it.
"""
