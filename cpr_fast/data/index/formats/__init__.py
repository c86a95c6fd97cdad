"""How data sets without official lists are organised: folders, text lists, tar files, extracted frames.

Imports `data.index`, `data.storage`, `data.video` and `data.files`; `data.index` may import it.
"""
