"""What open_clip checkpoints need: their files, towers, text side and image processor."""
