"""What the operators share: checks of their arguments, the functions of the library that are not operators, and rules
for `torch.vmap`.

Internal to `cpr_fast.ops`; imports torch and nothing else.
"""
