"""Commands that make, check and show data: synth, index, flow, show-sample, doctor.

Only `cpr_fast.cli` may import it.
"""
