"""The audit: evidence of hidden groups, and the group indicator matrix W."""
