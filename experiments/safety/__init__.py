"""The safety side: requests decided by a policy, steered or refused, checked, and scored."""
