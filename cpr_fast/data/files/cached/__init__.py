"""A disk cache of bounded size for the bytes of objects on servers: its files, and what leaves it when it is full.

Imports `data.files`, `errors` and `wording`; `data` may import it.
"""
