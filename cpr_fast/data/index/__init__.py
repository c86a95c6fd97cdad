"""The index of a data set: its CSV file, finding and listing videos by layout, probing them, and the report.

Imports `data.storage` and `data.video`; flow, clips, training and evaluation may import it.
"""
