"""What methods that train share: the loss against the dense net, the step, masks and schedules."""
