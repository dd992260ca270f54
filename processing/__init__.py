"""Image processor, processor and grounding data."""
