"""The HTML report of training runs, and the page of similar, duplicated and odd videos. Neither uses scripts or the
network.

Imports `config`, `runtime`, `data.index`, `evaluate` and its own packages; only `experiments` and `commands` may
import it.
"""
