"""From a description of the parts to a model: request, parts, assembly, upcycling."""
