"""The web page: uploaded images, a conversation about them, and what the model looked at."""
