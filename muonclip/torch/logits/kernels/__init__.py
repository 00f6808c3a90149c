"""GPU kernels, one per module; each module is imported where its kernel is launched, since it needs Triton."""
