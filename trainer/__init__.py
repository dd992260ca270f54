"""Training: stages, attention guidance, and trainers."""
