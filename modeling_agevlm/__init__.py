"""Configuration and model."""
