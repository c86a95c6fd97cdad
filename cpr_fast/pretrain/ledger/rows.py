"""What a row of the ledger holds: digests of what a step drew, computed and mined. The same on every rank.

Letters: B clips per rank, R ranks, L views that learn, V views, P positives, D feature width, W tensors.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import Config
from cpr_fast.pretrain.state.cycle import CycleState, has_key_encoder
from cpr_fast.pretrain.state.sharding import local, sum_of_shards
from cpr_fast.pretrain.step.result import StepResult

# In the order in which a step computes them: the first one that differs tells where two runs part.
FIELDS = ("step", "epoch", "cycle", "plan", "features", "mined", "loss", "weights")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HEAD = 2  # values of `observe` before the plan


def checksum(tensor: Tensor) -> Tensor:
    """Returns the sum of b (2 b + 1), modulo 2^64, over the bit patterns b of a tensor's elements, 0-d int64 on its
    device.

    Integer sums have no rounding, so the result depends neither on the device nor on the order of the additions.
    b (2 b + 1) is a bijection modulo 2^64 [Rivest et al., The RC6 Block Cipher, 1998], so every change of a single
    element changes the sum, and changes of +1 and -1 in the last place do not cancel. The order of the elements does
    not count.
    """
    bits = tensor.detach().view(BITS[tensor.element_size()]).to(torch.int64)
    return (bits * (2 * bits + 1)).sum()


@torch.no_grad()
def observe(result: StepResult) -> Tensor:
    """Returns what the row of a step is made of, [2 + R*B + R*B*P] int64 on the device, without waiting for it.

    These are the bits of the loss, the checksum of queries and keys together, the digest of each video's plan, and the
    mined slots (P = 0 if nothing was mined).
    """
    loss = result.loss.float().view(torch.int32).to(torch.int64)
    features = checksum(torch.cat([result.queries.flatten(), result.keys.flatten()]))
    mined = [] if result.mined is None else [result.mined.flatten()]
    return torch.cat([loss[None], features[None], result.plan, *mined])


def step_row(observed: np.ndarray, clips: int, *, step: int, epoch: int, cycle: int) -> dict[str, Any]:
    """Returns the row of a step.

    Args:
        observed: the values of `observe`, on the host.
        clips: R*B.
        step, epoch, cycle: numbers from 0, over all cycles.
    """
    end = _HEAD + clips
    loss = float(observed[:1].astype(np.int32).view(np.float32)[0])
    return {
        "step": step,
        "epoch": epoch,
        "cycle": cycle,
        "plan": _digest(observed[_HEAD:end]),
        "features": _digest(observed[1:_HEAD]),
        "mined": _digest(observed[end:]) if len(observed) > end else None,
        "loss": loss if np.isfinite(loss) else None,
    }


def weights_row(state: CycleState, *, step: int, epoch: int, cycle: int) -> dict[str, Any]:
    """Returns the row of the weights at the end of an epoch, after `step`. Waits for the device. All processes call it
    together.

    It is the digest of the checksum of each weight and each buffer of the query encoder and the key encoder.
    """
    encoders = [state.encoders.query] + [state.encoders.key] * (state.encoders.key is not state.encoders.query)
    tensors = [tensor for encoder in encoders for tensor in encoder.state_dict().values()]
    sums = sum_of_shards(torch.stack(list(map(checksum, local(tensors)))), tensors)
    return {"step": step, "epoch": epoch, "cycle": cycle, "weights": _digest(sums.cpu().numpy())}


def saved_weights(saved: dict[str, Any]) -> str:
    """Returns the field `weights` of the row before a checkpoint that was written at the end of an epoch, computed from
    the weights in the checkpoint."""
    config = Config.from_dict(saved["config"])
    view = config.schedule.cycles[saved["cycle"]].views(shared=config.model.shared)[0]
    encoders = [saved["encoders"][view]] + [saved["cycle_state"]["key"]] * has_key_encoder(config)
    sums = torch.stack([checksum(tensor).cpu() for encoder in encoders for tensor in encoder.values()])
    return _digest(sums.numpy())


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Returns the names of the fields in which two rows differ, apart from their `chain`."""
    return [name for name in FIELDS if (name in first, first.get(name)) != (name in second, second.get(name))]


def _digest(values: np.ndarray) -> str:
    """Returns the BLAKE2b digest of int64 values, 16 hexadecimal digits."""
    return hashlib.blake2b(values.astype("<i8").tobytes(), digest_size=8).hexdigest()
