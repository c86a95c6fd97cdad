"""The command line: one file per command, by subject.

The entry point `cpr_fast.cli` imports it; nothing else may.
"""
