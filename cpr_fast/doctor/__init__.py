"""The `doctor` command: checks of the machine and of an index, estimates, decoding parity, and the time of a step.

Imports `data`, `models`, `ops`, `config`, `runtime` and the checks of `pretrain`; only `commands` and `bench` may
import it.
"""
