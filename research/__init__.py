"""The laboratory: what the evidence, the ablations and the demo are made with. It is not installed."""
