"""A disk cache of bounded size for the bytes of objects on servers: its files, and what leaves it when it is full; and
the bytes that a process read last, in memory.

Imports `data.files`, `errors` and `wording`; `data` may import it.
"""
