"""What every run needs around it: processes, interruption, precision, progress, metrics, watchdog.

Imports `config` and `errors`; every room above may import it.
"""
