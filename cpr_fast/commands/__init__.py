"""The commands of the command line, one file for each: `data`, `training`, `reproduction` and
`evaluation`.

The modules of this folder itself are shared by all commands: checks of input files, types of options, printed output.

Only the entry point `cpr_fast.cli` may import it.
"""
