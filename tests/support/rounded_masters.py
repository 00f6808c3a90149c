"""What is left of float32 numbers in 24 bits, by arithmetic on their values."""

import numpy as np
import torch


def rounded_to_24(master):
    """To 16 bits of significand, fewer where a number is subnormal; half to even."""
    values = master.double().numpy()
    unit = np.maximum(np.frexp(values)[1] - 16, -141).astype(np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(np.ldexp(np.rint(np.ldexp(values, -unit)), unit).astype(np.float32))
