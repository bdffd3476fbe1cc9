"""Limits on a model and the whole numbers that meet them exactly; no torch."""

from allot.budget.allocation import Allocation
from allot.budget.budget import Budget
from allot.budget.channels import ChannelBudget
from allot.budget.costs import Term
from allot.budget.latency import Latency
from allot.budget.model_budget import ModelBudget

__all__ = ["Allocation", "Budget", "ChannelBudget", "Latency", "ModelBudget", "Term"]
