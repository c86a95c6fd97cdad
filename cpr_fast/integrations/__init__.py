"""Mining with a cascade inside trainers of other packages: PyTorch Lightning and pytorch-metric-learning.

Each module needs its package, which is not a dependency. No other package of `cpr_fast` uses them.

Imports `ops` and `mining`.
"""
