"""What a process will read: the clips of the coming steps, and the threads that fetch their bytes before they are read.

Imports `config`, `data.clips`, `data.index`, `data.video` and `data.files`; `data.clips` may import it.
"""
