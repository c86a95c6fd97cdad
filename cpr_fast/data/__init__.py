"""Videos in, clips out: index, clip sampling, the decoding pipeline, flow files and the synthetic actions.

Import from the modules themselves; this file stays empty of imports, so that `cpr_fast.data.index` and
`cpr_fast.data.synthetic` load without torch and DALI.
"""
