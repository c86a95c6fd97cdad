"""The HTML report of training runs: one self-contained page without scripts.

Imports `data`, `config` and `runtime`; only `experiments` and `commands` may import it.
"""
