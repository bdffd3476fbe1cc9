"""What is in the user's model, and running it with other tensors in place."""

from allot.network.attach import attach, fold
from allot.network.channels import ChannelPlan
from allot.network.compute import Compute
from allot.network.layers import Group, Layer, Rules, Scope

__all__ = ["ChannelPlan", "Compute", "Group", "Layer", "Rules", "Scope", "attach", "fold"]
