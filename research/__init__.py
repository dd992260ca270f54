"""The laboratory: the evidence, the ablations, and the pictures and weights of the demo. It is not installed."""
