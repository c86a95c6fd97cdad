"""`cascade_select` and `mil_nce` for a memory that is divided among processes, and the parts that they consist of.

`sharded_cascade_select` and `sharded_mil_nce` exchange what is needed over torch.distributed. The partial operators
compute the contribution of one process, and merge the contributions of all of them, without communication.

On the CPU each partial operator has a kernel; on CUDA it is computed by its reference in plain PyTorch.
"""
