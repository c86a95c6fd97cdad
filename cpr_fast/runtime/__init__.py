"""Infrastructure of every run: processes, interruption, precision, progress, metrics, watchdog.

Imports `config` and `errors`; all packages above it in `docs/architecture.md` may import it.
"""
