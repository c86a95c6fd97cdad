"""The command line: one file per command, by subject.

Only the entry point `cpr_fast.cli` may import it.
"""
