"""Programs that run as the members of a group, and the problems that they solve together."""
