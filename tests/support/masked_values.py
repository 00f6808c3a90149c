"""What models put where a query may not attend, as (name of the dtype, number), and biases that forbid nothing."""

import math

LOWEST = {
    "float16": -65504.0,
    "bfloat16": -3.3895313892515355e38,
    "float32": -3.4028234663852886e38,
    "float64": -1.7976931348623157e308,
}
FORBIDDING = [
    (dtype, value)
    for dtype, lowest in LOWEST.items()
    for value in (-math.inf, lowest, -1e9, -1e4)
    if value >= lowest or value == -math.inf
]
LOWEST_BIAS = -2000.0
"""Of ALiBi, far away: its pairs are allowed."""
