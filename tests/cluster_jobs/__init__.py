"""A package, so that its cluster, of scope `package`, ends with it."""
