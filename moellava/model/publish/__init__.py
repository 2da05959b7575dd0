"""What a published checkpoint carries: model card, remote code."""
