"""Muon's update over ranks: a plan of who iterates which matrix and which bytes move, and its execution.

Matrices only: parameter groups, options and state are `optimizer`'s, facts about ranks `mesh`'s.
"""

from muonclip.torch.update.cost_model import iteration_dtype
from muonclip.torch.update.execute import execute
from muonclip.torch.update.host_copies import on_host
from muonclip.torch.update.matrix_shards import MatrixShards, matrix_shards
from muonclip.torch.update.matrix_views import local_matrices, row_index
from muonclip.torch.update.plan import UpdatePlan, plan
from muonclip.torch.update.products import PRODUCTS, check_products, check_products_on, choose_products
from muonclip.torch.update.rounds import NewtonSchulzConfig, PlacedParameter
from muonclip.torch.update.split_weights import (
    WEIGHT_ERRORS,
    MasterWeightBits,
    error_dtypes,
    errors_of,
    has_master,
    joined,
    missing_errors,
    split_into,
)
from muonclip.torch.update.stages import MUON, ParameterStep, StepOptions, as_numbers, rescale
from muonclip.torch.update.stored_states import Rounding, convert_states, is_coded, read_codes

__all__ = [
    "MUON",
    "PRODUCTS",
    "WEIGHT_ERRORS",
    "MasterWeightBits",
    "MatrixShards",
    "NewtonSchulzConfig",
    "ParameterStep",
    "PlacedParameter",
    "Rounding",
    "StepOptions",
    "UpdatePlan",
    "as_numbers",
    "check_products",
    "check_products_on",
    "choose_products",
    "convert_states",
    "error_dtypes",
    "errors_of",
    "execute",
    "has_master",
    "is_coded",
    "iteration_dtype",
    "joined",
    "local_matrices",
    "matrix_shards",
    "missing_errors",
    "on_host",
    "plan",
    "read_codes",
    "rescale",
    "row_index",
    "split_into",
]
