"""Commands that evaluate a trained network: retrieve, probe, finetune, search, mine, report.

Only `cpr_fast.cli` may import it.
"""
