"""Other machines, reached by SSH: boxes that prune and train, boards that measure."""
