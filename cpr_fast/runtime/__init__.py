"""Infrastructure of every run: processes, interruption, precision, progress, metrics, watchdog.

Imports `config`; all packages above it may import it.
"""
