"""Other engines that serve a checkpoint of ours: what they look up in an installed moellava."""
