"""Commands that make, check and show data: synth, index, flow, show-sample, doctor.

Imports what its commands run; only `cli` may import it.
"""
